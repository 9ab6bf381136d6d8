// The picture of a job: its video, how it forms, or why there is none.
import { contentOf } from "./api.js";
import { h, icon, reducedMotion } from "./dom.js";
import { previewOf } from "./store.js";
import { stateOf } from "./words.js";

/** Give a box the shape of a job's picture. */
export function shapeLike(box, job) {
  const [width, height] = (job.size ?? "1x1").split("x").map(Number);
  box.style.aspectRatio = `${width} / ${height}`;
  box.style.setProperty("--ratio", width / height);
}

/** A box in the shape of the clip that shows what there is of it. */
export class MediaBox {
  /** @param {object} options `controls`: whether the video has its own. */
  constructor({ controls = true } = {}) {
    this.controls = controls;
    this.shown = null;
    this.element = h("div.media");
  }

  /** The video element, once there is one. */
  get video() {
    return this.element.querySelector("video");
  }

  /** Show a job as it stands; what is shown already stays untouched. */
  show(job) {
    shapeLike(this.element, job);
    const image = previewOf(job.id);
    const state = job.status === "completed" ? "video"
      : job.status === "in_progress" && image ? "preview" : job.status;
    const now = `${job.id} ${state}`;
    if (this.shown === now) {
      if (state === "preview") this.element.querySelector("img").src = image;
      return;
    }
    this.shown = now;
    this.element.dataset.state = state;
    this.element.replaceChildren(this.draw(job, state, image));
  }

  draw(job, state, image) {
    if (state === "video") return this.drawVideo(job);
    if (state === "preview") return h("img", { src: image, alt: "How it looks so far" });
    if (state === "failed") {
      return h("p.fate", {}, stateOf(job) === "cancelled" ? "Cancelled" : "This one failed");
    }
    return h("p.fate.waiting", {}, state === "queued" ? "Waiting" : "Forming");
  }

  drawVideo(job) {
    const video = h("video", {
      src: contentOf(job), poster: contentOf(job, "thumbnail"), controls: this.controls,
      loop: true, playsinline: true, preload: "auto",
      "aria-label": `Clip: ${job.prompt ?? job.title ?? job.id}`,
    });
    if (!reducedMotion()) {
      // Browsers refuse sound before the first click; then it waits to be started.
      video.addEventListener("loadeddata", () => video.play().catch(() => {}), { once: true });
    }
    return video;
  }
}

/** A card's picture: a still, which moves while it is pointed at. */
export function thumbnail(job) {
  const box = h("span.thumb");
  let shown = null;
  const show = (now) => {
    const image = previewOf(now.id);
    const state = now.status === "completed" ? "still" : image ? "preview" : now.status;
    if (state === shown && state !== "preview") return;
    shown = state;
    if (state === "still") box.replaceChildren(h("img", { src: contentOf(now, "thumbnail"), alt: "", loading: "lazy" }));
    else if (state === "preview") box.replaceChildren(h("img", { src: image, alt: "" }));
    else box.replaceChildren(h("span.fate", {}, now.status === "failed" ? icon("cancel") : "…"));
  };
  box.addEventListener("pointerenter", () => {
    if (shown !== "still" || reducedMotion()) return;
    const video = h("video", { src: contentOf(job), muted: true, loop: true, playsinline: true });
    video.muted = true;
    box.append(video);
    video.play().catch(() => {});
  });
  box.addEventListener("pointerleave", () => box.querySelector("video")?.remove());
  show(job);
  return { element: box, show };
}
