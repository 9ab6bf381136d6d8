// One stream of the server's events, for all jobs.
import { get } from "./api.js";
import { drop, jobOf, put, refresh, setPreview, update } from "./store.js";

const PAUSE_MS = 3000;

/**
 * Follow the server's events from now on, also across its restarts.
 * @param {(isThere: boolean) => void} onconnection
 */
export function follow(onconnection) {
  const source = new EventSource("/v1/events");
  const on = (name, take) => source.addEventListener(name, (event) => take(JSON.parse(event.data)));
  source.addEventListener("open", async () => {
    await Promise.allSettled([refresh("video"), refresh("film")]);
    onconnection(true);
  });
  source.addEventListener("error", () => {
    onconnection(false);
    if (source.readyState === EventSource.CLOSED) { // an answer that is no stream ends it for good
      setTimeout(() => follow(onconnection), PAUSE_MS);
    }
  });
  on("status", (job) => put(job, { isEvent: true }));
  on("queue", (facts) => jobOf(facts.id)?.status === "queued" && update(facts));
  on("progress", (facts) => {
    const before = jobOf(facts.id);
    update(facts);
    if (facts.object === "film" && before?.shot !== facts.shot) lookAgain(facts.id);
  });
  on("preview", ({ id, image }) => setPreview(id, image));
  on("deleted", ({ id }) => drop(id));
}

/** A film's next shot began, so the one before is finished. */
async function lookAgain(id) {
  try {
    put(await get(`/v1/films/${id}`));
  } catch {
    // deleted meanwhile; its own event follows
  }
}
