// All clips as cards, the newest first.
import { button, h } from "./dom.js";
import { thumbnail } from "./media.js";
import { hasMore, isFinished, jobsOf, readMore } from "./store.js";
import { attempt } from "./tell.js";
import { lengthOf, stateOf } from "./words.js";

export class Gallery {
  constructor() {
    this.cards = new Map();
    this.list = h("ul.cards");
    this.search = h("input", {
      type: "search", "aria-label": "Find a clip by its words", placeholder: "Find", oninput: () => this.draw(),
    });
    this.empty = h("p.soft", {}, "Clips that you make appear here.");
    this.more = button({
      words: "Older clips", onclick: () => attempt(() => readMore("video")), class: "wide",
    });
    this.element = h("section.gallery", { "aria-labelledby": "gallery-title" },
      h("header", {}, h("h2", { id: "gallery-title", tabindex: -1 }, "Gallery"), this.search),
      this.empty, this.list, this.more);
    this.current = [];
  }

  /** Draw what is known now; cards that stay are not touched, so that the focus stays, too. */
  draw() {
    const wanted = this.search.value.trim().toLowerCase();
    const jobs = jobsOf("video").filter((job) => job.prompt.toLowerCase().includes(wanted));
    this.order = jobs.map((job) => job.id);
    this.rescueFocus();
    const there = new Set(this.order);
    for (const [id, card] of this.cards) {
      if (!there.has(id)) {
        card.element.remove();
        this.cards.delete(id);
      }
    }
    jobs.forEach((job, index) => {
      const card = this.cards.get(job.id) ?? this.add(job);
      card.show(job);
      if (this.list.children[index] !== card.element) this.list.insertBefore(card.element, this.list.children[index] ?? null);
    });
    this.empty.hidden = jobs.length > 0;
    this.empty.textContent = !wanted ? "Clips that you make appear here."
      : hasMore("video") ? "None of the latest clips has these words; there are older ones." : "No clip has these words.";
    this.more.hidden = !hasMore("video");
    this.mark(this.current);
  }

  /** When the focused card goes, the one in its place has the focus. */
  rescueFocus() {
    const cards = [...this.list.children];
    const index = cards.findIndex((card) => card.contains(document.activeElement));
    if (index < 0 || this.order.includes(cards[index].dataset.id)) return;
    const next = [...cards.slice(index + 1), ...cards.slice(0, index).reverse()]
      .find((card) => this.order.includes(card.dataset.id));
    (next?.querySelector("a") ?? this.element.querySelector("h2")).focus();
  }

  add(job) {
    const picture = thumbnail(job);
    const state = h("span.state");
    const bar = h("progress", { max: 100, "aria-hidden": "true" });
    const link = h("a", { href: `#/clip/${job.id}` }, picture.element, h("span.words", {}, job.prompt), bar, state);
    const element = h("li", { "data-id": job.id }, link);
    const show = (now) => {
      picture.show(now);
      bar.hidden = isFinished(now);
      bar.value = now.progress;
      state.textContent = now.status === "completed" ? `${lengthOf(now)} · seed ${now.seed}` : stateOf(now);
    };
    const card = { element, show };
    this.cards.set(job.id, card);
    return card;
  }

  /** Mark the clips that are shown large. */
  mark(ids) {
    this.current = ids;
    for (const [id, card] of this.cards) {
      const link = card.element.querySelector("a");
      if (ids.includes(id)) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  /** The clip before or after the one that is shown. */
  neighbour(by) {
    const index = this.order.indexOf(this.current.at(-1));
    return this.order[Math.min(Math.max(index + by, 0), this.order.length - 1)];
  }
}
