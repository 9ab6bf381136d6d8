// Everything that waits, runs or ended lately, clips and films alike.
import { button, h, icon } from "./dom.js";
import { deleteJob, progressRow } from "./progress.js";
import { isFinished, jobsOf, listen } from "./store.js";
import { stateOf } from "./words.js";

const LATELY = 30;
const RANK = { in_progress: 0, queued: 1 };

export class JobList {
  constructor() {
    this.rows = new Map();
    this.open = h("ul.rows", { "aria-label": "Jobs that aren't finished" });
    this.none = h("p.soft", {}, "Nothing waits.");
    this.ended = h("ul.rows", { "aria-label": "Jobs that ended" });
    this.badge = document.getElementById("job-count");
    document.getElementById("jobs").append(this.open, this.none, h("h2", {}, "Ended lately"), this.ended);
    listen(() => this.draw());
  }

  draw() {
    const jobs = [...jobsOf("video"), ...jobsOf("film")];
    const open = jobs.filter((job) => !isFinished(job)).sort(
      (a, b) => RANK[a.status] - RANK[b.status] || (a.queue_position ?? 0) - (b.queue_position ?? 0));
    const ended = jobs.filter(isFinished)
      .sort((a, b) => b.completed_at - a.completed_at).slice(0, LATELY);
    this.badge.hidden = !open.length;
    this.badge.textContent = open.length;
    this.badge.setAttribute("aria-label", `${open.length} not finished`);
    this.none.hidden = open.length > 0;
    const there = new Set([...open, ...ended].map((job) => job.id));
    for (const [id, row] of this.rows) {
      if (there.has(id)) continue;
      if (row.element.contains(document.activeElement)) document.getElementById("jobs-title").focus();
      row.element.remove();
      this.rows.delete(id);
    }
    this.arrange(this.open, open);
    this.arrange(this.ended, ended);
  }

  arrange(list, jobs) {
    jobs.forEach((job, index) => {
      const row = this.rows.get(job.id) ?? this.add(job);
      row.show(job);
      if (list.children[index] === row.element) return;
      const hadFocus = row.element.contains(document.activeElement);
      list.insertBefore(row.element, list.children[index] ?? null);
      if (hadFocus) row.link.focus();
    });
  }

  add(job) {
    const isFilm = job.object === "film";
    const progress = progressRow(() => link.focus());
    const state = h("span.state");
    const name = isFilm ? job.title || `Film of ${job.shots.length} shots` : job.prompt;
    const link = h("a", { href: isFilm ? `#/films/${job.id}` : `#/clip/${job.id}` }, name);
    const remove = button({
      symbol: "delete", label: `Delete ${name}`, class: "quiet danger-quiet", onclick: () => deleteJob(job),
    });
    const element = h("li", {},
      h("div.head", {}, icon(isFilm ? "recipe" : "play"), link, state, remove), progress.element);
    const show = (now) => {
      progress.show(now);
      state.hidden = remove.hidden = !isFinished(now);
      const why = now.error && now.error.code !== "cancelled" ? `: ${now.error.message}` : "";
      state.textContent = stateOf(now) + why;
      element.dataset.status = now.status;
    };
    const row = { element, show, link };
    this.rows.set(job.id, row);
    return row;
  }
}
