"""What one layer consists of: the one place that FLOPs, memory, the profile, the fit and the shards read it from."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace

from profiler.model.experts import EXPERTS, Dispatch, ExpertsMLP
from profiler.model.fields import MAX_SIZE
from profiler.model.mlp import Activation, DenseMLP
from profiler.model.precision import FLOAT32, Precision
from profiler.model.rope import WHOLE_HEADS, Rotation
from profiler.model.tensors import AS_STORED, Cut, Dim, LinearSpec, NormSpec
from profiler.model.whole.layer import Mixer, seen_pairs

ROUTER = "router"  # the product that chooses experts: plain in every precision


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpec:
    """Keys and values of all heads made of one latent a token (MLA; DeepSeek-V2, 2405.04434).

    What is kept of a token: the latent of `rank` features, normed, and one key of `turned` features that all heads
    share. `expand` makes each head's own `plain` features of a key and `value` features of a value of the latent; `q`
    makes queries, of hidden states or of a latent of their own.
    """

    rank: int
    plain: int
    turned: int
    value: int
    q: LinearSpec
    expand: LinearSpec

    @property
    def kept(self) -> int:
        """Numbers that are kept of a token."""
        return self.rank + self.turned

    def absorbs(self, chunk: int, context: int) -> bool:
        """Whether a chunk takes fewer FLOPs over the latents themselves than over keys and values made of them.

        For a head, in multiplications: over latents each pair takes rank + turned + rank, and each query its way to
        the latents and back, rank * (plain + value); expanded, a pair takes plain + turned + value, and each key,
        of context and chunk, that same rank * (plain + value). One token always goes over latents.
        """
        made = self.rank * (self.plain + self.value)
        return seen_pairs(chunk, context) * (2 * self.rank - self.plain - self.value) < context * made

    @property
    def longest_absorbed(self) -> int:
        """Tokens of the longest chunk that `absorbs` after a context without end."""
        longer = 2 * self.rank - self.plain - self.value
        return MAX_SIZE if longer <= 0 else -(-self.rank * (self.plain + self.value) // longer)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Causal attention over all tokens before, in groups of query heads that share a KV head.

    With `latent` what is kept of a token stands in the place of its one KV head, and `qkv` makes it, beside the latent
    of the queries where they have one; the norms are those of the latents.
    """

    heads: Dim
    kv_heads: Dim
    qkv: LinearSpec
    o: LinearSpec
    q_norm: NormSpec | None = None  # of each head, or over all heads where it is cut by column
    k_norm: NormSpec | None = None
    window: int | None = field(default=None, repr=False)  # tokens that a query sees at most, its own included
    softcap: float | None = field(default=None, repr=False)  # scores are bent to stay below it
    sinks: NormSpec | None = field(default=None, repr=False)  # a score of each head that goes to nothing
    rotation: Rotation = field(default=WHOLE_HEADS, repr=False)
    latent: LatentSpec | None = None

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.heads.width

    @property
    def masking(self) -> dict[str, int]:
        """What besides the causal mask decides which keys count and how much, as the rows of attention name it."""
        traits = {"window": self.window or 0, "softcap": self.softcap is not None, "sinks": self.sinks is not None}
        return {name: int(value) for name, value in traits.items() if value}

    @property
    def turned_dim(self) -> int:
        """Features of a head that the rotation is about."""
        return self.latent.turned if self.latent else self.head_dim

    @property
    def kept_widths(self) -> tuple[int, int]:
        """Features of a KV head that are kept as keys, and as values: none of latents, which are both."""
        return (self.latent.kept, 0) if self.latent else (self.kv_heads.width, self.kv_heads.width)

    @property
    def pair_width(self) -> int:
        """Multiplications of a head for a (query, key) pair."""
        return self.head_dim + (self.latent.value if self.latent else self.head_dim)

    @property
    def norms_all_heads(self) -> bool:
        """Whether q and k are normed over all their heads at once, which stand on all ranks of a group."""
        return self.q_norm is not None and self.q_norm.cut is Cut.COLUMN

    def sizes(self, tp_size: int) -> dict[str, int]:
        """The heads of a rank, as the rows of attention name them."""
        sizes = {
            "heads": self.heads.per_rank(tp_size),
            "kv_heads": self.kv_heads.per_rank(tp_size),
            "head_dim": self.head_dim,
        }
        latent = self.latent
        return sizes | ({"latent": latent.rank, "turned": latent.turned, "value": latent.value} if latent else {})

    def kv_elements(self, tp_size: int) -> int:
        """Numbers that a rank keeps of one token: its key and its value, or its latent."""
        return self.kv_heads.per_rank(tp_size) * sum(self.kept_widths)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """A decoder layer: attention, and MLP or experts, each added to the residual stream, with norms around them."""

    attention: AttentionSpec
    mlp: DenseMLP | ExpertsMLP
    before_attention: NormSpec | None = None
    after_attention: NormSpec | None = None  # of the block's output, before it is added
    before_mlp: NormSpec | None = None
    after_mlp: NormSpec | None = None

    @property
    def hidden_size(self) -> int:
        """Features of the residual stream."""
        return self.attention.qkv.inputs.size

    @property
    def linears(self) -> tuple[LinearSpec, ...]:
        """Its matrix products that every token goes through, in the order in which they run."""
        mlp = self.mlp
        others = mlp.linears if isinstance(mlp, ExpertsMLP) else (mlp.gate_up, mlp.down)
        queries = (self.attention.latent.q,) if self.attention.latent else ()
        return self.attention.qkv, *queries, self.attention.o, *others

    @property
    def every_linear(self) -> tuple[LinearSpec, ...]:
        """The same and those of each expert, where experts have tensors of their own."""
        mlp = self.experts
        if mlp is None or mlp.tensors_of.is_stacked:
            return self.linears
        return *self.linears, *(matrix for expert in range(mlp.experts.count) for matrix in mlp.matrices(expert))

    @property
    def norms(self) -> tuple[NormSpec, ...]:
        """Those of its norms that it has."""
        attention = self.attention
        all_norms = (
            self.before_attention, attention.q_norm, attention.k_norm, attention.sinks, self.after_attention,
            self.before_mlp, self.after_mlp,
        )  # fmt: skip
        return tuple(norm for norm in all_norms if norm is not None)

    @property
    def variant(self) -> str:
        """What besides sizes and precision decides a layer's element-wise work, as the rows of a profile name it."""
        traits = {
            "latent": self.attention.latent is not None,
            "post-norm": self.after_attention is not None or self.after_mlp is not None,
            "qk-norm": self._norms_heads,
            "qk-norm-all-heads": self.attention.norms_all_heads,
            "gelu": isinstance(self.mlp, DenseMLP) and self.mlp.activation is Activation.GELU_TANH,
            "experts": self.experts is not None,
        }
        traits |= {f"kept-{linear.name}": linear.kept for linear in self.linears if linear.name != ROUTER}
        traits |= {f"kept-{EXPERTS}": self.experts is not None and self.experts.kept}
        return "+".join(name for name, present in traits.items() if present)

    @property
    def _norms_heads(self) -> bool:
        attention = self.attention
        return attention.q_norm is not None and attention.latent is None and not attention.norms_all_heads

    def sizes(self, tp_size: int) -> dict[str, int]:
        """The sizes of a rank's part, as the rows of `elementwise` and `layer` name them."""
        mlp = self.mlp.shared if isinstance(self.mlp, ExpertsMLP) else self.mlp
        intermediate = mlp.features(tp_size) if mlp else 0
        return {"hidden": self.hidden_size, "intermediate": intermediate} | self.attention.sizes(tp_size)

    def products(self, tp_size: int = 1) -> dict[str, tuple[int, int]]:
        """Its matrix products on a rank: name -> (out features n, in features k)."""
        return {linear.name: linear.sizes(tp_size) for linear in self.linears}

    def product_elements(self, tp_size: int = 1) -> int:
        """Numbers in the matrices of a rank that are multiplied and added for every token: of routed experts those
        that it goes to, and what expands its latent, once."""
        routed = self.experts.active_elements(tp_size) if self.experts else 0
        latent = self.attention.latent
        expanding = latent.expand.num_elements(tp_size) if latent else 0
        return sum(n * k for n, k in self.products(tp_size).values()) + routed + expanding

    def num_elements(self, tp_size: int = 1) -> int:
        """Numbers that a rank holds: matrices, biases and norms; with one rank, the layer's parameters."""
        routed = self.experts.num_elements(tp_size) if self.experts else 0
        return sum(tensor.num_elements(tp_size) for tensor in self._weights) + routed

    @property
    def kv_numbers(self) -> int:
        """Numbers that are kept of a token."""
        return self.attention.kv_elements(1)

    @property
    def state_numbers(self) -> int:
        """Numbers that are kept of a prompt, however long."""
        return 0

    @property
    def window(self) -> int | None:
        """How many tokens a query sees at most; None: all before it."""
        return self.attention.window

    @property
    def idle_elements(self) -> int:
        """Numbers of experts that a token does not go to."""
        return self.experts.matrix_elements() - self.experts.active_elements() if self.experts else 0

    @property
    def dense(self) -> DenseMLP:
        """Its MLP, where it has no experts."""
        assert isinstance(self.mlp, DenseMLP)  # what takes dense layers alone checks for it
        return self.mlp

    @property
    def experts(self) -> ExpertsMLP | None:
        """Its routed experts, if it has any."""
        return self.mlp if isinstance(self.mlp, ExpertsMLP) else None

    def spread(self, ep_size: int, *, beside: int = 1, dispatch: Dispatch = Dispatch.NONE) -> LayerSpec:
        """The same with its experts spread so, if it has any: see `ExpertsMLP`."""
        if self.experts is None:
            return self
        return replace(self, mlp=self.experts.spread(ep_size, beside=beside, dispatch=dispatch))

    def traits(self, tp_size: int) -> dict[str, int]:
        """What besides `sizes` tells whole layers apart: masks, and experts."""
        return self.attention.masking | (self.experts.sizes(tp_size) if self.experts else {})

    @property
    def kind(self) -> str:
        """In words, as tables name it."""
        attention = self.attention
        words = [f"sliding window {attention.window}" if attention.window else str(Mixer.FULL)]
        words = [str(Mixer.LATENT)] if attention.latent else words
        words += ["sinks"] if attention.sinks else []
        words += [f"softcap {attention.softcap:g}"] if attention.softcap else []
        words += ["no rotation"] if attention.rotation.is_off else []
        if self.experts:
            shared = " and shared" if self.experts.shared else ""
            words.append(f"{self.experts.router.per_token} of {self.experts.experts.count} experts{shared}")
        return ", ".join(words)

    @property
    def lacks_on_cards(self) -> str | None:
        """What kernels here do of it on a CPU alone, or None."""
        named = {"window": "sliding windows", "softcap": "softcaps", "sinks": "attention sinks"}
        found = [named[name] for name in self.attention.masking]
        found += (["latent attention"] if self.attention.latent else []) + (["experts"] if self.experts else [])
        return " and ".join(found) or None

    @property
    def is_as_stored(self) -> bool:
        """Whether it runs with the very numbers of its checkpoint, under no mask but the causal one: what quantizing
        takes, and without experts training and pruning."""
        folded = [*(linear.is_folded for linear in self.linears), *(norm.folding != AS_STORED for norm in self.norms)]
        mlp, attention = self.mlp, self.attention
        plain = not mlp.tensors_of.is_stacked if isinstance(mlp, ExpertsMLP) else mlp.activation is Activation.SILU
        whole = attention.rotation == WHOLE_HEADS and not attention.latent and not attention.masking
        return plain and whole and not any(folded)

    def attention_flops(self, chunk: int, context: int) -> int:
        """FLOPs of all (query, key) pairs that the causal mask keeps: two for each multiplication; latents count as
        expanded."""
        attention = self.attention
        return 2 * attention.heads.count * attention.pair_width * seen_pairs(chunk, context, attention.window)

    def keeping(self, names: Collection[str], *, group_size: int | None = None) -> LayerSpec:
        """The same layer with these of its linears plain in every precision, and scales for groups of inputs."""

        def kept(linear: LinearSpec) -> LinearSpec:
            return replace(linear, kept=linear.kept or linear.name in names, group_size=group_size)

        def of_mlp(mlp: DenseMLP) -> DenseMLP:
            return replace(mlp, gate_up=kept(mlp.gate_up), down=kept(mlp.down))

        attention, mlp = self.attention, self.mlp
        latent = attention.latent and replace(attention.latent, q=kept(attention.latent.q))
        if isinstance(mlp, ExpertsMLP):
            shared = mlp.shared and of_mlp(mlp.shared)
            made: DenseMLP | ExpertsMLP = replace(mlp, shared=shared, kept=EXPERTS in names, group_size=group_size)
        else:
            made = of_mlp(mlp)
        attention = replace(attention, qkv=kept(attention.qkv), o=kept(attention.o), latent=latent)
        return replace(self, attention=attention, mlp=made)

    def weights_bytes(self, precision: Precision, tp_size: int = 1) -> int:
        """Bytes of all that a rank holds of it, scales of quantized matrices included."""
        matrices = sum(
            precision.matrix_bytes(*linear.sizes(tp_size), kept=linear.kept, group_size=linear.group_size)
            for linear in self.linears
        )
        counted = sum(n * k for n, k in self.products(tp_size).values())
        if self.experts:
            matrices += self.experts.matrix_bytes(precision, tp_size)
            counted += self.experts.matrix_elements(tp_size)
        return matrices + precision.weights.num_bytes(self.num_elements(tp_size) - counted)

    def reduced_bytes(self, precision: Precision) -> tuple[int, ...]:
        """Bytes a token of each all-reduce of a tensor-parallel group in this layer."""
        outputs = (precision.reductions.num_bytes(self.hidden_size),) * 2  # of attention, and of the MLP or experts
        squares = FLOAT32.num_bytes(2)  # of q and of k
        return (squares, *outputs) if self.attention.norms_all_heads else outputs

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name within the layer and shape of the checkpoint's tensors."""
        plain = {name: size for tensor in self._weights for name, size in tensor.tensors().items()}
        return plain | (self.experts.tensors() if self.experts else {})

    @property
    def _weights(self) -> tuple[LinearSpec | NormSpec, ...]:
        expanding = (self.attention.latent.expand,) if self.attention.latent else ()
        return *self.linears, *expanding, *self.norms
