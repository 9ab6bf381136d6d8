// Progress of a job: a bar, words, and a button that stops it.
import { post, remove } from "./api.js";
import { confirmDialog } from "./dialog.js";
import { button, h } from "./dom.js";
import { drop, isFinished, put } from "./store.js";
import { announce, attempt } from "./tell.js";
import { leftOf, stateOf } from "./words.js";

/** A row that follows one job. */
export function progressRow(onend = () => {}) {
  const bar = h("progress", { max: 100, "aria-label": "Progress" });
  const words = h("span.state");
  const left = h("span.left");
  let job = null;
  const cancel = button({
    symbol: "cancel", words: "Cancel", class: "small",
    onclick: async () => { if (await cancelJob(job)) onend(); },
  });
  const element = h("div.progress", {}, bar, h("div", {}, words, left, cancel));
  const show = (now) => {
    job = now;
    element.hidden = isFinished(job);
    if (job.status === "queued") bar.removeAttribute("value");
    else bar.value = job.progress;
    words.textContent = stateOf(job);
    left.textContent = leftOf(job);
    const name = job.prompt ?? job.title ?? "film";
    cancel.setAttribute("aria-label", `Cancel ${name}`);
  };
  return { element, show };
}

/** End a job that isn't finished. */
export async function cancelJob(job) {
  const now = await attempt(() => post(`/v1/${job.object}s/${job.id}/cancel`));
  if (!now) return false;
  put(now);
  announce("Cancelled");
  return true;
}

/** Delete a job and its files, once that is meant. */
export async function deleteJob(job) {
  const what = job.object === "film" ? "film" : "clip";
  if (!(await confirmDialog(`Delete this ${what}?`, "It can't be brought back.", "Delete"))) {
    return false;
  }
  const done = await attempt(() => remove(`/v1/${job.object}s/${job.id}`));
  if (!done) return false;
  drop(job.id);
  announce("Deleted");
  return true;
}

/** Announce a job's states and quarters to screen readers. */
export class Narrator {
  constructor() {
    this.reported = new Map();
  }

  narrate(job) {
    const quarter = job.status === "in_progress" ? Math.floor(job.progress / 25) : 0;
    const now = `${job.status} ${quarter}`;
    const before = this.reported.get(job.id);
    this.reported.set(job.id, now);
    if (before === undefined && isFinished(job)) return; // it was so when the page was opened
    if (before === now) return;
    const name = job.object === "film" ? `The film ${job.title ?? ""}` : `“${job.prompt}”`;
    const words = quarter ? `${25 * quarter} percent, ${leftOf(job)}` : stateOf(job);
    announce(`${name}: ${words}`);
  }
}
