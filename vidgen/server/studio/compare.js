// Two clips side by side that play as one, with the words marked that differ.
import { button, h, icon, reducedMotion } from "./dom.js";
import { MediaBox } from "./media.js";
import { progressRow } from "./progress.js";
import { markedPrompt } from "./prompt.js";
import { diffWords, lengthOf, rate } from "./words.js";

const DRIFT_S = 0.04;

export class Compare {
  constructor() {
    this.jobs = [null, null];
    this.sides = ["before", "after"].map((name) => this.makeSide(name));
    this.title = h("h2", { tabindex: -1 }, "Side by side");
    this.play = button({ symbol: "play", label: "Play both", class: "quiet", onclick: () => this.toggle() });
    this.slider = h("input", {
      type: "range", min: 0, max: 1, step: "any", value: 0, "aria-label": "Time in both clips",
      oninput: () => this.seek(Number(this.slider.value)),
    });
    this.verdict = h("p.facts", { role: "status" });
    this.element = h("article.compare.panel", { "aria-label": "Two clips" },
      this.title,
      h("div.sides", {}, this.sides.map((side) => side.element)),
      h("div.transport", {}, this.play, this.slider),
      this.verdict);
  }

  makeSide(name) {
    const media = new MediaBox({ controls: false });
    const progress = progressRow(() => this.title.focus());
    const words = h("div");
    const link = h("a.button.small");
    const element = h("figure", { "data-side": name },
      media.element, h("figcaption", {}, words, progress.element, link));
    return { media, progress, words, link, element };
  }

  /** Show two clips as they stand. */
  show(before, after) {
    const isOther = this.jobs[0]?.id !== before.id || this.jobs[1]?.id !== after.id;
    this.jobs = [before, after];
    if (isOther) {
      const marked = diffWords(before.prompt, after.prompt);
      this.sides.forEach((side, index) => {
        side.words.replaceChildren(markedPrompt(marked[index]));
        side.link.href = `#/clip/${this.jobs[index].id}`;
      });
    }
    this.sides.forEach((side, index) => {
      const job = this.jobs[index];
      const earlier = side.media.video;
      side.media.show(job);
      side.progress.show(job);
      side.link.textContent = `Seed ${job.seed}, ${lengthOf(job)}: open`;
      if (side.media.video && side.media.video !== earlier) this.take(side.media.video);
    });
    this.verdict.textContent = this.judge(before, after);
  }

  judge(before, after) {
    if (after.kind === "replay" && after.source_video_id === before.id) {
      return `The same request and seed ${after.seed}, so the same frames.`;
    }
    if (before.seed === after.seed) return `Both grow from seed ${after.seed}.`;
    return `Seeds ${before.seed} and ${after.seed}.`;
  }

  /** Have a new video follow the others' time. */
  take(video) {
    video.loop = false;
    video.muted = this.sides[0].media.video !== video; // one sound at a time
    video.addEventListener("loadedmetadata", () => { this.slider.max = this.duration; });
    video.addEventListener("timeupdate", () => this.follow(video));
    video.addEventListener("ended", () => this.again());
    for (const name of ["playing", "pause"]) video.addEventListener(name, () => this.drawPlay());
    if (this.videos.length === 2) {
      this.seek(0);
      if (!reducedMotion()) this.start();
    }
  }

  get videos() {
    return this.sides.map((side) => side.media.video).filter(Boolean);
  }

  get duration() {
    return Math.max(...this.videos.map((video) => video.duration || 0), 0.01);
  }

  get isPlaying() {
    return this.videos.some((video) => !video.paused && !video.ended);
  }

  /** The longest one leads; the other is put right when it drifts off. */
  follow(video) {
    const leader = this.videos.find((each) => each.duration === this.duration);
    if (video !== leader) return;
    this.slider.value = video.currentTime;
    for (const other of this.videos) {
      const wanted = Math.min(video.currentTime, other.duration || 0);
      if (other !== video && Math.abs(other.currentTime - wanted) > DRIFT_S) other.currentTime = wanted;
    }
  }

  again() {
    if (this.videos.every((video) => video.ended) && !reducedMotion()) {
      this.seek(0);
      this.start();
    }
    this.drawPlay();
  }

  start() {
    for (const video of this.videos) video.play().catch(() => {});
  }

  toggle() {
    if (this.isPlaying) for (const video of this.videos) video.pause();
    else {
      if (this.videos.every((video) => video.ended)) this.seek(0);
      this.start();
    }
  }

  seek(time) {
    for (const video of this.videos) video.currentTime = Math.min(time, video.duration || 0);
  }

  /** One frame on, or back. */
  step(by) {
    for (const video of this.videos) video.pause();
    const now = this.videos[0]?.currentTime ?? 0;
    this.seek(Math.min(Math.max(now + by / rate(this.jobs[0].fps), 0), this.duration));
  }

  drawPlay() {
    const isPlaying = this.isPlaying;
    this.play.replaceChildren(icon(isPlaying ? "pause" : "play"));
    this.play.title = isPlaying ? "Pause both" : "Play both";
    this.play.setAttribute("aria-label", this.play.title);
  }

  /** Pause while another view is shown. */
  rest() {
    for (const video of this.videos) video.pause();
  }
}
