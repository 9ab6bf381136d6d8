// The view of films: which there are, the one that is open, its script as a storyboard.
import { contentOf } from "./api.js";
import { button, h, icon } from "./dom.js";
import { FilmEditor } from "./film_editor.js";
import { MediaBox, thumbnail } from "./media.js";
import { deleteJob, progressRow } from "./progress.js";
import { go, goQuietly } from "./router.js";
import { fetchJob, hasMore, isFinished, jobOf, jobsOf, listen, readMore } from "./store.js";
import { attempt, toast } from "./tell.js";
import { lengthOf, stateOf } from "./words.js";

export class Films {
  constructor(model) {
    this.film = null;
    this.cards = new Map();
    this.editor = new FilmEditor(model, (film) => goQuietly("films", film.id));
    this.media = new MediaBox();
    this.progress = progressRow(() => this.title.focus());
    this.title = h("h2", { tabindex: -1 }, "New film");
    this.actions = h("div.actions");
    this.result = h("article.panel.result", { "aria-label": "Film" }, this.title, this.media.element, this.progress.element, this.actions);
    this.heading = h("h2", {}, "Films");
    this.list = h("ul.cards.small");
    this.more = button({ words: "Older films", class: "wide", onclick: () => attempt(() => readMore("film")) });
    this.element = h("div.filming", {},
      h("aside", {},
        button({ symbol: "add", words: "New film", class: "wide", onclick: () => this.begin() }),
        this.result,
        this.heading, this.list, this.more),
      this.editor.element);
    document.getElementById("films").append(this.element);
    this.showFilm();
    if (this.editor.filmId) this.resume(this.editor.filmId);
    listen((what, id) => this.onChange(what, id));
  }

  /** Open a film by its id; without one what was edited last stays. */
  async open(id, quietly) {
    if (!id || this.film?.id === id) return;
    let film;
    try {
      film = await fetchJob(id);
    } catch (error) {
      toast(error.message);
      goQuietly("films");
      return;
    }
    const keepsScript = this.editor.filmId === id;
    if (!keepsScript && !(await this.editor.mayLeave())) return;
    this.film = film;
    this.editor.load(film, { keepsScript });
    this.showFilm();
    if (!quietly) this.title.focus({ preventScroll: true });
  }

  /** The film that was worked on when the page was left. */
  async resume(id) {
    try {
      const film = await fetchJob(id);
      if (this.film) return;
      this.film = film;
      this.editor.load(film, { keepsScript: true });
      this.showFilm();
    } catch {
      this.editor.forget(); // it was deleted meanwhile; the script stands alone
    }
  }

  async begin() {
    if (!(await this.editor.mayLeave())) return;
    this.film = null;
    goQuietly("films");
    this.editor.begin();
    this.showFilm();
    this.editor.element.querySelector("textarea").focus();
  }

  onChange(what, id) {
    this.drawList();
    if (this.film?.id !== id) return;
    if (what === "gone") {
      this.film = null;
      this.editor.forget();
      this.title.focus();
      goQuietly("films");
    } else {
      this.film = jobOf(id);
      this.editor.show(this.film);
    }
    this.showFilm();
  }

  showFilm() {
    const film = this.film;
    this.result.hidden = !film;
    this.cards.forEach((card, id) => card.mark(id === film?.id));
    if (!film) return;
    this.title.textContent = film.title || "Untitled film";
    this.media.show(film);
    this.progress.show(film);
    const now = `${film.id} ${film.status}`;
    if (this.shownActions !== now) {
      this.shownActions = now;
      this.actions.replaceChildren(...this.drawActions(film));
    }
  }

  drawActions(film) {
    const isDone = film.status === "completed";
    const file = (variant, words) => h("a.button", { href: contentOf(film, variant, { download: true }), download: true }, words);
    return [
      film.error && h("p.wrong", {}, film.error.message),
      ...(film.warnings ?? []).map((text) => h("p.warning", {}, text)),
      isDone && h("a.button", { href: contentOf(film, "video", { download: true }), download: `${film.id}.mp4` }, icon("download"), h("span", {}, "Download")),
      isDone && h("a.button", { href: contentOf(film, "storyboard"), target: "_blank", rel: "noopener" }, icon("recipe"), h("span", {}, "Storyboard")),
      isDone && (film.files ?? []).some((name) => name.endsWith(".srt")) && file("srt", "Subtitles"),
      isFinished(film) && button({ symbol: "delete", words: "Delete", class: "danger-quiet", onclick: () => deleteJob(film) }),
    ].filter(Boolean);
  }

  drawList() {
    const films = jobsOf("film");
    const there = new Set(films.map((film) => film.id));
    for (const [id, card] of this.cards) {
      if (there.has(id)) continue;
      if (card.element.contains(document.activeElement)) this.title.focus();
      card.element.remove();
      this.cards.delete(id);
    }
    films.forEach((film, index) => {
      const card = this.cards.get(film.id) ?? this.add(film);
      card.show(film);
      if (this.list.children[index] !== card.element) this.list.insertBefore(card.element, this.list.children[index] ?? null);
    });
    this.heading.hidden = !films.length;
    this.more.hidden = !hasMore("film");
  }

  add(film) {
    const picture = thumbnail(film);
    const state = h("span.state");
    const words = h("span.words", {}, film.title || `${film.shots.length} shots`);
    const link = h("a", { href: `#/films/${film.id}`, onclick: () => this.film?.id === film.id && go("films", film.id) }, picture.element, words, state);
    const show = (now) => {
      picture.show(now);
      state.textContent = now.status === "completed" ? `${lengthOf(now)}${now.draft ? ", draft" : ""}` : stateOf(now);
    };
    const mark = (isCurrent) => (isCurrent ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current"));
    const card = { element: h("li", {}, link), show, mark };
    this.cards.set(film.id, card);
    return card;
  }
}
