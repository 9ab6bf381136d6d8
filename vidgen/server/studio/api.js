// The API: one function for every request, errors as the service words them.
import { askForKey, authorization } from "./key.js";

const TRIES = 3;
const PAUSE_MS = 600;

/** An error that the service answered. */
export class ApiError extends Error {
  /** @param {number} status of HTTP; 0 where no answer came. @param {object} answer the error envelope. */
  constructor(status, answer) {
    super(answer.message);
    this.status = status;
    this.code = answer.code;
    this.param = answer.param;
  }
}

export const get = (path) => request("GET", path);
export const remove = (path) => request("DELETE", path);
/** Values that are files make the body multipart, else it is JSON; null values are left out. */
export const post = (path, fields = {}) => request("POST", path, fields);

/** Where a file of a job lies. */
export function contentOf(job, variant = "video", { download = false } = {}) {
  const tail = download ? "&download=1" : "";
  return `/v1/${job.object}s/${job.id}/content?variant=${variant}${tail}`;
}

/** Where a file of a film's shot lies, or of the take of a seed where it has several. */
export function contentOfShot(film, shot, variant = "video", take = null) {
  const tail = take === null ? "" : `&take=${take}`;
  return `/v1/films/${film.id}/shots/${encodeURIComponent(shot.id)}/content?variant=${variant}${tail}`;
}

async function request(method, path, fields) {
  const given = Object.entries(fields ?? {}).filter(([, value]) => value != null && value !== "");
  const body = fields && encode(given);
  const headers = { ...authorization() };
  if (typeof body === "string") headers["Content-Type"] = "application/json";
  // The same key on every try, so that a lost answer never makes a job twice.
  if (method === "POST") headers["Idempotency-Key"] = randomKey();
  const response = await send(path, { method, headers, body });
  if (response.status === 401 && (await askForKey())) return request(method, path, fields);
  const answer = await response.json().catch(() => null);
  if (response.ok) return answer;
  throw new ApiError(response.status, answer?.error ?? {
    message: `the service answered ${response.status} ${response.statusText}`,
  });
}

async function send(path, options) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await fetch(path, options);
    } catch {
      if (tries === TRIES) {
        throw new ApiError(0, { message: "the service can't be reached; is it running?" });
      }
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS * tries));
    }
  }
}

function encode(given) {
  const hasFile = given.some(([, value]) => [value].flat().some((each) => each instanceof Blob));
  if (!hasFile) return JSON.stringify(Object.fromEntries(given));
  const form = new FormData();
  for (const [name, value] of given) {
    if (Array.isArray(value)) {
      const suffix = value.some((each) => each instanceof Blob) ? "" : "[]";
      for (const each of value) form.append(name + suffix, each);
    } else if (typeof value === "object" && !(value instanceof Blob)) {
      for (const [inner, each] of Object.entries(value)) form.append(`${name}[${inner}]`, each);
    } else {
      form.append(name, value);
    }
  }
  return form;
}

/** Also where the page is no secure context, which has no randomUUID. */
function randomKey() {
  return [...crypto.getRandomValues(new Uint8Array(16))]
    .map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
