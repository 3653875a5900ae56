// Calls of the service. The session is a cookie that scripts cannot read; changes carry a header that only this page sends.

const BASE = "/api/v1";

export class Refused extends Error {
  constructor(problem) { super(problem.detail ?? problem.title); this.problem = problem; }
}

export async function call(method, path, body, headers = {}, signal = null) {
  const answer = await fetch(BASE + path, {
    method,
    signal,
    headers: { "x-isochunk": "1", ...(body === undefined ? {} : { "content-type": "application/json" }), ...headers },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  if (answer.status === 204) return null;
  const content = await answer.json().catch(() => ({ title: `status ${answer.status}`, status: answer.status }));
  if (!answer.ok) {
    if (answer.status === 401) dispatchEvent(new Event("signed-out"));
    throw new Refused(content);
  }
  return content;
}

export const get = (path) => call("GET", path);
export const post = (path, body = {}, signal = null) => call("POST", path, body, {}, signal);

// Calls of which only the last counts: one that is asked anew is taken back, so that the service need not begin it.
export function lastOf(action) {
  let before = null;
  return (...given) => {
    before?.abort();
    before = new AbortController();
    return action(before.signal, ...given);
  };
}

export async function all(path, most = 4000) {
  const items = [];
  let cursor = null;
  do {
    const page = await get(`${path}${path.includes("?") ? "&" : "?"}limit=200${cursor ? `&cursor=${cursor}` : ""}`);
    items.push(...page.items);
    cursor = page.next;
  } while (cursor && items.length < most);
  return items;
}

export const follow = (job, after) => new EventSource(`${BASE}/jobs/${job}/events?after=${after}`);
