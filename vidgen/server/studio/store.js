// Known state of all jobs, and listeners for its changes.
import { get } from "./api.js";

const PAGE = 24;
const RANK = { queued: 0, in_progress: 1, completed: 2, failed: 2 };
const jobs = new Map();
const previews = new Map();
const listeners = new Set();
const pages = { video: { last: null, more: false }, film: { last: null, more: false } };

export const isFinished = (job) => job.status === "completed" || job.status === "failed";
export const jobOf = (id) => jobs.get(id);
/** The picture that shows how a clip forms, as a data URL. */
export const previewOf = (id) => previews.get(id);
export const hasMore = (kind) => pages[kind].more;

/** Jobs of a kind, the newest first. */
export function jobsOf(kind) {
  return [...jobs.values()].filter((job) => job.object === kind)
    .sort((a, b) => b.created_at - a.created_at || b.order - a.order);
}

/** Hear (what, id): "status", "progress", "preview" or "gone" of a job. */
export function listen(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

/**
 * Take a whole job in.
 * @param {object} job
 * @param {object} options `isEvent`: it comes from the stream of events, which are in order. An
 *     answer may be older than the latest events of the stream; then it is left out.
 */
export function put(job, { isEvent = false } = {}) {
  const before = jobs.get(job.id);
  if (!isEvent && before && RANK[job.status] < RANK[before.status]) return;
  jobs.set(job.id, { ...job, order: before?.order ?? jobs.size });
  if (isFinished(job)) previews.delete(job.id);
  tell("status", job.id);
}

/** Take in how far a job is, or where it stands in the queue. */
export function update(facts) {
  const job = jobs.get(facts.id);
  if (!job || isFinished(job)) return;
  if (facts.shot && facts.shot !== job.shot) previews.delete(job.id); // it is of another one
  jobs.set(job.id, { ...job, ...facts });
  tell("progress", job.id);
}

export function setPreview(id, image) {
  previews.set(id, image);
  tell("preview", id);
}

export function drop(id) {
  previews.delete(id);
  if (jobs.delete(id)) tell("gone", id);
}

/** A job by its id, asked for where it isn't known yet. */
export async function fetchJob(id) {
  if (!jobs.has(id)) put(await get(`/v1/${id.split("_")[0]}s/${id}`));
  return jobs.get(id);
}

/** Read the newest jobs, and forget those of that time that are gone. */
export async function refresh(kind) {
  const page = await get(`/v1/${kind}s?limit=${PAGE}`);
  const known = new Set(page.data.map((job) => job.id));
  const oldest = page.has_more ? page.data.at(-1).created_at : -Infinity;
  const asked = Date.now() / 1000;
  for (const job of jobsOf(kind)) {
    const isNew = job.created_at > asked - 5; // it may have been made while we asked
    if (!known.has(job.id) && job.created_at > oldest && !isNew) drop(job.id);
  }
  takeIn(kind, page);
}

/** Read the page of older jobs after the loaded ones. */
export async function readMore(kind) {
  takeIn(kind, await get(`/v1/${kind}s?limit=${PAGE}&after=${pages[kind].last}`));
}

function takeIn(kind, page) {
  pages[kind] = { last: page.last_id, more: page.has_more };
  for (const job of [...page.data].reverse()) put(job);
  tell("page", null);
}

function tell(what, id) {
  for (const listener of [...listeners]) listener(what, id);
}
