// The view of clips: the form, one clip or two, the gallery.
import { Compare } from "./compare.js";
import { Composer } from "./composer.js";
import { h } from "./dom.js";
import { Gallery } from "./gallery.js";
import { go, goQuietly, route } from "./router.js";
import { Stage } from "./stage.js";
import { fetchJob, jobOf, jobsOf, listen } from "./store.js";
import { announce, toast } from "./tell.js";

const NARROW = "(max-width: 860px)";

export class Clips {
  constructor(model) {
    this.composer = new Composer(model, (job) => this.onmade(job));
    this.stage = new Stage(this.composer);
    this.compare = new Compare();
    this.gallery = new Gallery();
    this.welcome = h("article.stage.panel.welcome", {},
      h("p", {}, "Say what is to be seen, and the clip forms here."));
    this.place = document.getElementById("stage");
    document.getElementById("composer").append(this.composer.element);
    document.getElementById("gallery").append(this.gallery.element);
    this.ids = [];
    this.show([]);
    listen((what, id) => this.onChange(what, id));
  }

  /** @param {string[]} ids of the one or two clips to be shown; none shows the newest. */
  async open(ids, quietly) {
    const newest = jobsOf("video").slice(0, 1).map((job) => job.id);
    const wanted = [ids, this.ids, newest].find((each) => each.length) ?? [];
    const isOther = wanted.join() !== this.ids.join();
    this.ids = wanted;
    try {
      await Promise.all(wanted.map(fetchJob));
    } catch (error) {
      if (ids.length) toast(error.message);
      goQuietly("clips");
      return;
    }
    if (wanted.join() !== this.ids.join()) return; // another was opened meanwhile
    this.show(wanted.map(jobOf));
    if (quietly || !isOther || !ids.length) return;
    const title = wanted.length === 2 ? this.compare.title : this.stage.title;
    title.focus({ preventScroll: true });
    this.intoView();
  }

  show(jobs) {
    const [one, two] = jobs;
    if (two) this.compare.show(one, two);
    else if (one) this.stage.show(one);
    const shown = two ? this.compare : one ? this.stage : { element: this.welcome };
    if (this.place.firstChild !== shown.element) {
      this.compare.rest();
      this.stage.rest();
      this.place.replaceChildren(shown.element);
    }
    this.gallery.mark(this.ids);
  }

  onChange(what, id) {
    if (what === "gone" && this.ids.includes(id)) {
      const next = [...this.ids, this.gallery.neighbour(1), this.gallery.neighbour(-1)]
        .find((each) => each && each !== id);
      this.ids = [];
      if (next) {
        go("clip", next);
      } else {
        this.show([]);
        this.composer.prompt.focus();
      }
    }
    if (what !== "preview" || this.gallery.cards.has(id)) this.gallery.draw();
    if (this.ids.includes(id)) this.show(this.ids.map(jobOf).filter(Boolean));
    const isIdle = !this.ids.length && ["clips", "clip"].includes(route()[0]);
    if (isIdle && what === "page" && jobsOf("video").length) this.open([], true);
  }

  /** A clip was queued by the form: it is shown, and the focus stays in the form. */
  onmade(job) {
    announce("Queued");
    goQuietly("clip", job.id);
    if (matchMedia(NARROW).matches) this.intoView();
  }

  intoView() {
    const block = matchMedia(NARROW).matches ? "start" : "nearest";
    this.place.firstChild.scrollIntoView({ block, behavior: "instant" });
  }

  /** The clip or pair of clips on the stage; both can be played and stepped through. */
  get shown() {
    return this.ids.length === 2 ? this.compare : this.stage;
  }
}
