// Requests to the server: its key, its errors, its streams.

export class ApiError extends Error {
  constructor(status, error) {
    super(error.message);
    this.status = status;
    this.param = error.param ?? null;
  }
}

// The key lives as long as the tab, and is sent nowhere but here.
export const key = {
  get: () => sessionStorage.getItem("redmux-key") ?? "",
  set(value) {
    if (value) sessionStorage.setItem("redmux-key", value);
    else sessionStorage.removeItem("redmux-key");
  },
};

export async function request(method, path, { json, body, headers = {}, signal } = {}) {
  headers = { ...headers };
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (json !== undefined) {
    headers["content-type"] = "application/json";
    body = JSON.stringify(json);
  }
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal, cache: "no-store" });
  } catch (err) {
    if (err.name === "AbortError") throw err;
    // Browsers refuse headers with characters beyond Latin-1 before they send anything.
    const why = /[^\x20-\xff]/.test(key.get())
      ? "the API key holds characters that no key has"
      : "the server is not reached; is it running?";
    throw new ApiError(0, { message: why });
  }
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  try {
    return new ApiError(response.status, (await response.json()).error);
  } catch {
    return new ApiError(response.status, { message: `the server answered ${response.status}` });
  }
}

export async function listModels() {
  return (await (await request("GET", "/v1/models")).json()).data;
}

export async function putAdapter(name, file, replace) {
  const path = name.split("/").map(encodeURIComponent).join("/");
  const response = await request("PUT", `/v1/adapters/${path}?replace=${replace}`, {
    body: file,
    headers: { "content-type": "application/octet-stream" },
  });
  return response.json();
}

// Calls take(index, data) for every event of the answers of several models, until all have ended.
export async function sideBySide(id, path, models, body, signal, take) {
  const response = await request("POST", "/v1/side_by_side", {
    json: { path, models, request: body },
    headers: { "x-request-id": id },
    signal,
  });
  for await (const { name, data } of events(response.body)) {
    if (data !== "[DONE]") take(name === "" ? null : Number(name), JSON.parse(data));
    else if (name !== "") take(Number(name), null);
  }
}

export async function stopOne(id, index) {
  await request("DELETE", `/v1/side_by_side/${id}/${index}`);
}

// Yields the server-sent events of a body, however the network has cut it.
async function* events(body) {
  const decoder = new TextDecoder();
  const reader = body.getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const whole = rest.split("\n\n");
      rest = whole.pop();
      for (const event of whole) {
        let name = "", data = "";
        for (const line of event.split("\n")) {
          if (line.startsWith("event: ")) name = line.slice(7);
          else if (line.startsWith("data: ")) data += line.slice(6);
        }
        yield { name, data };
      }
    }
  } finally {
    reader.releaseLock();
  }
}
