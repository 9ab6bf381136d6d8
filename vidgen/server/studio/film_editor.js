// A film's script as cards, one a shot, and as text; checked, and made; changed shots are made again.
import { post } from "./api.js";
import { confirmDialog } from "./dialog.js";
import { button, field, h, icon } from "./dom.js";
import { changedShots, closed, newScript, newShot, opened, withoutShot } from "./script.js";
import { ShotCard } from "./shot.js";
import { isFinished, put } from "./store.js";
import { announce, attempt, clearFormError, showFormError } from "./tell.js";
import { seconds } from "./words.js";

const STORE = "vidgen.film";

export class FilmEditor {
  /** @param {(film: object) => void} onmade called with each film that is queued. */
  constructor(model, onmade) {
    this.model = model;
    this.onmade = onmade;
    this.film = null; // the one whose shots are taken over
    this.filmId = null; // its id, also before it is read
    this.before = null; // its script
    this.files = new Map();
    this.cards = new Map();
    this.element = this.draw();
    this.restore();
  }

  draw() {
    this.head = h("div.film-head");
    this.list = h("ol.shots", { "aria-label": "Shots" });
    this.messages = h("div.messages", { role: "status" });
    this.text = h("textarea.source", { rows: 16, spellcheck: "false", "aria-label": "The script as JSON", oninput: () => this.readText() });
    this.source = h("details", { ontoggle: () => this.writeText() }, h("summary", {}, "As text"), h("div.stack", {}, this.text));
    this.makeWords = h("span", {}, "Make film");
    this.main = h("button.main", { type: "submit" }, this.makeWords, h("kbd", {}, "Ctrl ⏎"));
    this.form = h("form.film-editor", {
      id: "film", novalidate: true, "aria-label": "Script",
      onsubmit: (event) => { event.preventDefault(); this.render(); },
    },
      this.drawFile(), this.head, this.list,
      button({ symbol: "add", words: "Add a shot", class: "wide", onclick: () => this.add() }),
      this.source,
      h("div.finish.panel", {},
        this.messages,
        h("div", { "data-errors": true }),
        h("div.actions", {},
          this.main,
          button({ words: "Draft", onclick: () => this.render({ draft: true }), title: "Few steps, one take, small" }),
          button({ words: "Check", onclick: () => this.check() }))));
    return this.form;
  }

  drawFile() {
    const file = h("input.unseen", {
      type: "file", accept: ".yaml,.yml,.json", id: "script-file",
      onchange: () => this.openFile(file.files[0]).finally(() => { file.value = ""; }),
    });
    return h("div.actions.file", {}, file,
      h("label.button.small", { for: file.id }, icon("open"), "Open script"),
      button({ symbol: "download", words: "Save script", class: "small", onclick: () => this.save() }));
  }

  drawHead() {
    const project = this.script.project;
    const text = (name, label, attributes = {}) => {
      const input = h("input", {
        value: project[name] ?? "", autocomplete: "off", ...attributes,
        oninput: () => {
          const value = attributes.type === "number" && input.value !== "" ? Number(input.value) : input.value;
          if (value === "") delete project[name];
          else project[name] = value;
          this.changed();
        },
      });
      return field(label, input);
    };
    this.head.replaceChildren(
      h("div.pair", {}, text("title", "Title", { placeholder: "Untitled film" }), text("style", "Style of all shots", { placeholder: "at sunset" })),
      h("div.pair", {}, text("seed", "Seed of the film", { type: "number", min: 0, step: 1 }), text("size", "Size", { placeholder: this.model.defaults.size })));
  }

  /** Draw the whole script again. */
  drawAll() {
    this.drawHead();
    this.cards.clear();
    this.list.replaceChildren();
    for (const shot of this.script.shots) this.list.append(this.cardOf(shot).element);
    this.changed();
  }

  cardOf(shot) {
    const card = new ShotCard(shot, this);
    this.cards.set(shot.id, card);
    return card;
  }

  /** Draw one shot's card again. */
  redraw(shot) {
    const old = this.cards.get(shot.id);
    const card = this.cardOf(shot);
    old.element.replaceWith(card.element);
    card.again.focus();
  }

  /** Ids of the shots before one, which it may continue. */
  others(shot) {
    return this.script.shots.slice(0, this.script.shots.indexOf(shot)).map((each) => each.id);
  }

  /** After an edit: show the shots to make, and keep the script over a reload. */
  changed() {
    clearFormError(this.form);
    this.messages.replaceChildren(); // of the script as it was checked
    this.mark();
    this.writeText();
    localStorage.setItem(STORE, JSON.stringify({ script: this.script, film: this.filmId }));
  }

  /** Show each shot's state, and the main button's action. */
  mark() {
    const { film } = this;
    const changed = changedShots(this.script, this.before);
    const made = new Map((this.film?.shots ?? []).map((shot) => [shot.id, shot]));
    this.script.shots.forEach((shot, index) => {
      const isNew = !this.before?.shots.some((each) => each.id === shot.id);
      this.cards.get(shot.id).show(index, this.film, isNew ? null : made.get(shot.id) ?? null, changed.has(shot.id));
    });
    const isEnded = film && isFinished(film);
    const count = this.script.shots.filter(({ id }) => changed.has(id)
      || (isEnded && made.get(id)?.status !== "completed")).length;
    const isWhole = !isEnded || film.draft || count === this.script.shots.length;
    this.makeWords.textContent = isWhole ? "Make film"
      : count === 0 ? "Join again" : `Make ${count} ${changed.size ? "changed " : ""}${count === 1 ? "shot" : "shots"}`;
  }

  get isDirty() {
    const now = JSON.stringify(closed(this.script));
    return this.before ? now !== JSON.stringify(closed(this.before)) : this.script.shots.some((shot) => shot.prompt[0].prompt);
  }

  async mayLeave() {
    if (!this.isDirty) return true;
    return confirmDialog("Leave this script?", "It has changes of which no film was made.", "Leave it");
  }

  add() {
    const shot = newShot(this.script.shots);
    this.script.shots.push(shot);
    this.place(shot);
  }

  copy(like) {
    const shot = newShot(this.script.shots, like);
    this.script.shots.splice(this.script.shots.indexOf(like) + 1, 0, shot);
    this.place(shot);
  }

  place(shot) {
    const card = this.cardOf(shot);
    this.list.insertBefore(card.element, this.list.children[this.script.shots.indexOf(shot)] ?? null);
    this.followAnew();
    this.changed();
    card.element.querySelector("textarea").focus();
  }

  move(shot, by) {
    const { shots } = this.script;
    const from = shots.indexOf(shot);
    const to = from + by;
    if (to < 0 || to >= shots.length) return;
    const focused = document.activeElement;
    shots.splice(to, 0, ...shots.splice(from, 1));
    const { element } = this.cards.get(shot.id);
    this.list.insertBefore(element, this.list.children[by > 0 ? to + 1 : to] ?? null);
    focused?.focus();
    announce(`Shot ${shot.id} is number ${to + 1} now`);
    this.followAnew();
    this.changed();
  }

  remove(shot) {
    const index = this.script.shots.indexOf(shot);
    this.script = withoutShot(this.script, shot.id);
    if (!this.script.shots.length) this.script.shots.push(newShot([]));
    this.drawAll();
    const next = this.script.shots[Math.min(index, this.script.shots.length - 1)];
    this.cards.get(next.id).element.querySelector("textarea").focus();
    announce(`Shot ${shot.id} removed`);
  }

  followAnew() {
    for (const card of this.cards.values()) card.drawFollows();
  }

  /** Keep a file that the script names until the film is sent; its name there. */
  attach(file) {
    const name = file.name.replace(/[^\w .-]/g, "_").replace(/^\W+/, "");
    this.files.set(name, new File([file], name, { type: file.type }));
    return name;
  }

  writeText() {
    if (this.source.open && document.activeElement !== this.text) {
      this.text.value = JSON.stringify(closed(this.script), null, 2);
    }
  }

  readText() {
    try {
      const script = opened(JSON.parse(this.text.value));
      if (!script.shots.length) throw new SyntaxError("there are no shots");
      this.script = script;
      this.drawAll();
    } catch (error) {
      showFormError(this.form, { message: `The text is no script yet: ${error.message}` });
    }
  }

  request(draft) {
    const files = [...this.files.values()];
    return {
      script: JSON.stringify(closed(this.script)), format: "json", draft: draft ?? null,
      previous_film_id: this.film?.id, files: files.length ? files : null,
    };
  }

  async check() {
    clearFormError(this.form);
    this.messages.replaceChildren();
    try {
      const found = await post("/v1/films/check", this.request());
      const words = `${found.shots.length} ${found.shots.length === 1 ? "shot" : "shots"}, `
        + `${Number(found.seconds).toFixed(1)} s at ${found.size}`
        + (found.expected_s ? `, about ${seconds(found.expected_s)} of work if all is new.` : ".");
      this.messages.replaceChildren(h("p", {}, words), ...found.notes.map((note) => h("p.warning", {}, note)));
    } catch (error) {
      showFormError(this.form, error);
    }
  }

  /** One shot was given another seed: the film once more, as a draft where it is one. */
  renderAgain() {
    return this.render({ draft: this.film.draft });
  }

  /** Queue the film; finished, unchanged shots are reused. */
  async render({ draft = false } = {}) {
    clearFormError(this.form);
    try {
      const film = await post("/v1/films", this.request(draft));
      this.files.clear(); // the next film takes them over from this one
      put(film);
      announce("The film is queued");
      this.filmId = film.id;
      this.onmade(film);
    } catch (error) {
      showFormError(this.form, error);
    }
  }

  /** Take a film to work on; its script, too, unless the one that is edited grew out of it. */
  load(film, { keepsScript }) {
    this.film = film;
    this.filmId = film.id;
    this.before = opened(film.script);
    if (keepsScript) {
      this.changed();
    } else {
      this.script = opened(film.script);
      this.drawAll();
    }
  }

  /** The film in the editor has progressed. */
  show(film) {
    this.film = film;
    this.mark();
  }

  /** The film was deleted; its script stays. */
  forget() {
    this.film = this.filmId = null;
    this.before = null;
    this.changed();
  }

  /** An empty script. */
  begin() {
    this.script = newScript();
    this.files.clear();
    this.film = this.filmId = null;
    this.before = null;
    this.messages.replaceChildren();
    this.drawAll();
  }

  /** Restore the script that was edited when the page was left. */
  restore() {
    let kept = null;
    try {
      kept = JSON.parse(localStorage.getItem(STORE));
    } catch {
      localStorage.removeItem(STORE);
    }
    this.begin();
    if (!kept?.script?.shots?.length) return;
    this.script = kept.script;
    this.filmId = kept.film;
    this.drawAll();
  }

  /** A script from a file: JSON here, YAML and lists by the service, which knows them. */
  async openFile(file) {
    if (!file || !(await this.mayLeave())) return;
    const text = await file.text();
    const kind = file.name.split(".").pop().toLowerCase().replace("yml", "yaml");
    const found = await attempt(async () => (kind === "json" ? { script: JSON.parse(text) }
      : post("/v1/films/check", { script: text, format: kind })));
    if (!found) return;
    this.begin();
    this.script = opened(found.script);
    this.drawAll();
    announce(`${file.name} is open`);
  }

  save() {
    const text = JSON.stringify(closed(this.script), null, 2);
    const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const name = (this.script.project.title || "film").replace(/[^\w-]+/g, "-").toLowerCase();
    h("a", { href: url, download: `${name}.json` }).click();
    URL.revokeObjectURL(url);
  }
}
