// One clip, large: how it forms, then its video, its facts, and what can be done with it.
import { contentOf, post } from "./api.js";
import { button, h, icon } from "./dom.js";
import { askToExtend } from "./extend.js";
import { MediaBox } from "./media.js";
import { deleteJob, progressRow } from "./progress.js";
import { changeablePrompt } from "./prompt.js";
import { showRecipe } from "./recipe.js";
import { go } from "./router.js";
import { isFinished, put } from "./store.js";
import { attempt } from "./tell.js";
import { lengthOf, rate, seconds } from "./words.js";

const KINDS = {
  remix: "Changed from", extension: "Goes on from", edit: "Re-imagines", replay: "Replay of",
};

export class Stage {
  /** @param {object} composer whose form takes a clip's settings over. */
  constructor(composer) {
    this.composer = composer;
    this.job = null;
    this.media = new MediaBox();
    this.progress = progressRow(() => this.title.focus());
    this.title = h("h2", { tabindex: -1, class: "unseen" }, "Clip");
    this.words = h("div");
    this.details = h("div");
    this.element = h("article.stage.panel", { "aria-label": "Clip" },
      this.title, this.media.element, this.progress.element, this.words, this.details);
    this.shownDetails = null;
  }

  /** Show a clip as it stands. */
  show(job) {
    const isOther = this.job?.id !== job.id;
    this.job = job;
    this.media.show(job);
    this.progress.show(job);
    if (isOther) {
      this.prompt = changeablePrompt(job.prompt, (prompt) => this.change(prompt));
      this.words.replaceChildren(this.prompt.element);
      this.title.textContent = `Clip: ${job.prompt}`;
    }
    const now = `${job.id} ${job.status}`;
    if (now !== this.shownDetails) {
      // the focused element may vanish: Cancel when a clip is done
      const hadFocus = this.details.contains(document.activeElement)
        || (isFinished(job) && document.activeElement === document.body);
      this.shownDetails = now;
      this.details.replaceChildren(...this.drawDetails(job));
      if (hadFocus) this.title.focus({ preventScroll: true });
    }
    this.composer.offerSeed(job.seed);
  }

  drawDetails(job) {
    const isDone = job.status === "completed";
    return [
      job.error && h("p.wrong", {}, job.error.message),
      job.source_video_id && h("p.origin", {},
        `${KINDS[job.kind] ?? "Made from"} `,
        h("a", { href: `#/clip/${job.source_video_id}` }, "another clip"), " · ",
        h("a", { href: `#/compare/${job.source_video_id}/${job.id}` }, "compare")),
      ...(job.warnings ?? []).map((text) => h("p.warning", {}, text)),
      isDone && job.checks?.findings?.length > 0 && h("ul.findings", { "aria-label": "What the checks found" },
        job.checks.findings.map((each) => h("li", { "data-severity": each.severity }, each.text))),
      this.drawActions(job),
      this.drawFacts(job),
    ].filter(Boolean);
  }

  drawActions(job) {
    const isDone = job.status === "completed";
    return h("div.actions", {},
      isDone && button({ symbol: "edit", words: "Change a word", onclick: () => this.prompt.start(), "aria-keyshortcuts": "c" }),
      isDone && button({ symbol: "extend", words: "Extend", onclick: () => this.extend(), "aria-keyshortcuts": "e" }),
      isDone && button({ symbol: "image", words: "Re-imagine", onclick: () => this.composer.reimagine(job) }),
      isFinished(job) && button({ symbol: "replay", words: isDone ? "Replay" : "Try again", onclick: () => this.replay(), "aria-keyshortcuts": "r" }),
      button({ symbol: "copy", words: "Use settings", onclick: () => this.composer.use(job), "aria-keyshortcuts": "u" }),
      isDone && button({ symbol: "recipe", words: "Recipe", onclick: () => showRecipe(job), "aria-keyshortcuts": "i" }),
      isDone && h("a.button", { href: contentOf(job, "video", { download: true }), download: `${job.id}.mp4`, "aria-keyshortcuts": "d" },
        icon("download"), h("span", {}, "Download")),
      button({ symbol: "delete", words: "Delete", class: "danger-quiet", onclick: () => this.delete(), "aria-keyshortcuts": "Delete" }));
  }

  drawFacts(job) {
    const made = job.inference_time_s && `made in ${seconds(job.inference_time_s)}`;
    const facts = [
      job.seed != null && `seed ${job.seed}`, job.size, lengthOf(job), `${rate(job.fps)} fps`,
      `${job.num_inference_steps} steps`, job.model, job.status === "completed" && made,
      job.resumed > 0 && `went on ${job.resumed === 1 ? "once" : `${job.resumed} times`} after a stop`,
    ];
    return h("p.facts", {}, facts.filter(Boolean).join(" · "));
  }

  /** The same request and seed with another prompt; shown next to this clip. */
  async change(prompt) {
    const made = await attempt(() => post(`/v1/videos/${this.job.id}/remix`, { prompt }));
    if (!made) return false;
    put(made);
    go("compare", this.job.id, made.id);
    return true;
  }

  async extend() {
    const made = await askToExtend(this.job);
    if (made) go("clip", made.id);
  }

  async replay() {
    const made = await attempt(() => post(`/v1/videos/${this.job.id}/replay`));
    if (!made) return;
    put(made);
    if (this.job.status === "completed") go("compare", this.job.id, made.id);
    else go("clip", made.id);
  }

  toggle() {
    const { video } = this.media;
    if (video?.paused) video.play().catch(() => {});
    else video?.pause();
  }

  /** One frame on, or back. */
  step(by) {
    const { video } = this.media;
    if (!video) return;
    video.pause();
    video.currentTime = Math.min(Math.max(video.currentTime + by / rate(this.job.fps), 0), video.duration);
  }

  /** Pause while another view is shown. */
  rest() {
    this.media.video?.pause();
  }

  async delete() {
    await deleteJob(this.job);
  }
}
