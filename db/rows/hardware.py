"""The hardware a measurement belongs to: the device and everything else that changes its speed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime

from sqlalchemy import ScalarSelect, func, select
from sqlalchemy.orm import Session

from db.errors import UserError
from db.store.engine import Database
from db.store.provenance import code_version, now
from db.store.tables import HardwareRow, MeasurementRow
from db.store.upsert import insert_if_new

_GIB = 2**30
_MAY_COME_LATE = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine configuration.

    Another driver, torch, backend or thread count is another hardware: its times differ.
    """

    device: str  # as the driver or the CPU names itself
    device_count: int
    memory_bytes: int  # of one device
    driver: str
    torch_version: str
    backend: str  # torch.distributed's: "gloo" or "nccl"
    num_threads: int  # of one rank
    link: str  # what joins the devices

    @property
    def device_type(self) -> str:
        """Type of its devices, "cpu" or "cuda": NCCL joins cards."""
        return "cuda" if self.backend == "nccl" else "cpu"

    @property
    def fingerprint(self) -> str:
        """Equal for equal hardware. Memory counts in whole GiB, because reserved memory changes from boot to boot."""
        fields = asdict(self) | {"memory_bytes": round(self.memory_bytes / _GIB) * _GIB}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]

    def computes_like(self, other: Hardware) -> bool:
        """Whether the two differ at most in the link, so that work of a single rank takes equally long on both."""
        return replace(self, link=other.link).fingerprint == other.fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHardware:
    """A stored hardware with the number of its measurements and their dates."""

    id: int
    hardware: Hardware
    num_measurements: int
    last_measured_at: datetime | None


def save_hardware(database: Database, hardware: Hardware) -> int:
    """Keep the hardware, once however often it is saved; return its id."""
    with database.session() as session:
        return hardware_id(session, hardware)


def get_hardware(database: Database, hardware_id: int) -> Hardware:
    """The hardware of that id. Raises UserError when there is none."""
    with database.reading() as session:
        row = session.get(HardwareRow, hardware_id)
        known = session.scalars(select(HardwareRow.id).order_by(HardwareRow.id)).all() if row is None else []
    if row is None:
        allowed = f"must be one of {', '.join(map(str, known))}" if known else "the database holds no hardware"
        raise UserError("hardware", hardware_id, allowed)
    return _from_row(row)


def list_hardware(database: Database) -> list[StoredHardware]:
    """All hardware in the order it was first seen."""
    return HardwareList(database).read()


class HardwareList:
    """Lists all hardware repeatedly; each call counts only the measurements added since the previous one."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counted: dict[int, tuple[int, int]] = {}
        """Of each hardware an id that was counted up to, and how many there were."""

    def read(self) -> list[StoredHardware]:
        """All hardware in the order it was first seen."""
        mine = MeasurementRow.hardware_id == HardwareRow.id
        last = select(func.max(MeasurementRow.measured_at)).where(mine).scalar_subquery()
        found = []
        with self._database.reading() as session:
            for row, measured_at in session.execute(select(HardwareRow, last).order_by(HardwareRow.id)):
                count = self._count(session, row.id)
                found.append(
                    StoredHardware(
                        id=row.id, hardware=_from_row(row), num_measurements=count, last_measured_at=measured_at
                    )
                )
        return found

    def _count(self, session: Session, hardware_id: int) -> int:
        # Measurements are replaced in place and never deleted, and ids rise; those of writers at once may come late.
        known_id, known = self._counted.get(hardware_id, (0, 0))
        mine = (MeasurementRow.hardware_id == hardware_id, MeasurementRow.id > known_id)
        highest, count = session.execute(select(func.max(MeasurementRow.id), func.count()).where(*mine)).one()
        settled_id = (highest or 0) - _MAY_COME_LATE
        if settled_id > known_id + _MAY_COME_LATE:
            settled = select(func.count()).where(*mine, MeasurementRow.id <= settled_id)
            self._counted[hardware_id] = (settled_id, known + (session.scalar(settled) or 0))
        return known + int(count)


def hardware_id(session: Session, hardware: Hardware) -> int:
    """The id of the hardware within a transaction, adding its row if it is new."""
    values = {"fingerprint": hardware.fingerprint, "created_at": now(), "code_version": code_version()}
    insert_if_new(session, HardwareRow, [asdict(hardware) | values], unique=["fingerprint"])
    return session.scalars(select(HardwareRow.id).where(HardwareRow.fingerprint == hardware.fingerprint)).one()


def id_of(hardware: Hardware) -> ScalarSelect[int]:
    """The id of the hardware as part of a query."""
    return select(HardwareRow.id).where(HardwareRow.fingerprint == hardware.fingerprint).scalar_subquery()


def _from_row(row: HardwareRow) -> Hardware:
    return Hardware(
        device=row.device,
        device_count=row.device_count,
        memory_bytes=row.memory_bytes,
        driver=row.driver,
        torch_version=row.torch_version,
        backend=row.backend,
        num_threads=row.num_threads,
        link=row.link,
    )
