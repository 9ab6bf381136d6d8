// One shot of the storyboard: its picture, its words, its settings, its takes.
import { contentOfShot } from "./api.js";
import { button, field, h, icon, reducedMotion } from "./dom.js";
import { DropZone } from "./drop.js";
import { shapeLike } from "./media.js";
import { CAMERA_MOVES, TRANSITIONS, newSeed } from "./script.js";
import { previewOf } from "./store.js";

const STATES = {
  new: "new", changed: "changed", completed: "made", draft: "draft", in_progress: "being made",
  queued: "waits", failed: "not made",
};

export class ShotCard {
  /**
   * @param {object} shot of the script; it is changed in place.
   * @param {object} editor notified of changes: `changed`, `move`, `copy`, `remove`, `redraw`,
   *     `renderAgain`, `attach(file)`; asked for `others(shot)`, ids of the shots before it.
   */
  constructor(shot, editor) {
    this.shot = shot;
    this.editor = editor;
    this.shown = null;
    this.picture = h("div.media");
    this.state = h("span.badge");
    this.takes = h("div.takes");
    this.number = h("span.number");
    this.element = h("li.shot.panel", { "aria-label": `Shot ${shot.id}`, "data-id": shot.id },
      h("div.side", {}, this.picture, this.drawTools()),
      h("div.body", {}, this.drawHead(), this.drawPrompts(), this.drawBasics(), this.takes, this.drawMore()));
  }

  set(name, value) {
    if (value === "" || value == null || Number.isNaN(value)) delete this.shot[name];
    else this.shot[name] = value;
    this.editor.changed();
  }

  drawHead() {
    return h("div.head", {}, this.number, h("strong", {}, this.shot.id), this.state);
  }

  drawTools() {
    const act = (symbol, words, run, extra = {}) => button({
      symbol, label: `${words} shot ${this.shot.id}`, class: "quiet", onclick: run, ...extra,
    });
    this.again = button({
      symbol: "replay", words: "New take", class: "small", onclick: () => this.newTake(),
      title: "Draw a new seed for this shot and make only this shot again",
    });
    return h("div.tools", {},
      this.again,
      act("up", "Move up", () => this.editor.move(this.shot, -1)),
      act("down", "Move down", () => this.editor.move(this.shot, 1)),
      act("copy", "Copy", () => this.editor.copy(this.shot)),
      act("delete", "Remove", () => this.editor.remove(this.shot)));
  }

  drawPrompts() {
    const box = h("div.prompts");
    const draw = () => box.replaceChildren(
      ...this.shot.prompt.map((each, index) => this.drawPrompt(each, index, draw)),
      button({
        symbol: "add", words: "Then…", class: "small quiet", title: "Go on with another prompt at a later time",
        onclick: () => {
          this.shot.prompt.push({ prompt: "", at: (this.shot.prompt.at(-1).at || 0) + 1 });
          draw();
          box.querySelectorAll("textarea")[this.shot.prompt.length - 1].focus();
          this.editor.changed();
        },
      }));
    draw();
    return box;
  }

  drawPrompt(each, index, redraw) {
    const text = h("textarea", {
      rows: 2, value: each.prompt, placeholder: "a cat spins in a green meadow",
      oninput: () => { each.prompt = text.value; this.editor.changed(); },
    });
    if (index === 0) return field("What is seen", text);
    const at = h("input", {
      type: "number", min: 0, step: "any", value: each.at,
      oninput: () => { each.at = Number(at.value); this.editor.changed(); },
    });
    const remove = button({
      symbol: "cancel", label: "Remove this prompt", class: "quiet",
      onclick: () => {
        this.shot.prompt.splice(index, 1);
        redraw();
        this.element.querySelector("textarea").focus();
        this.editor.changed();
      },
    });
    return h("div.then", {}, field("From second", at), field("Then", text), remove);
  }

  numberField(name, label, attributes = {}) {
    const input = h("input", {
      type: "number", step: "any", min: 0, value: this.shot[name] ?? "", inputmode: "decimal", ...attributes,
      oninput: () => this.set(name, input.value === "" ? null : Number(input.value)),
    });
    return field(label, input);
  }

  choice(label, options, value, take) {
    const select = h("select", { onchange: () => take(select.value) },
      options.map(([each, words]) => h("option", { value: each }, words)));
    select.value = value ?? "";
    return field(label, select);
  }

  drawBasics() {
    this.seed = this.numberField("seed", "Seed", { step: 1, placeholder: "its own", inputmode: "numeric" });
    this.follows = h("div");
    this.drawFollows();
    return h("div.quad", {},
      this.numberField("duration", "Seconds", { placeholder: "model’s" }),
      this.numberField("takes", "Takes", { min: 1, max: 100, step: 1, placeholder: "1" }),
      this.seed,
      this.follows);
  }

  /** Choice of the shot that it continues; drawn again when the order changes. */
  drawFollows() {
    const others = this.editor.others(this.shot).map((id) => [id, id]);
    this.follows.replaceChildren(this.choice("Goes on from", [["", "nothing"], ...others],
      this.shot.continue_from, (id) => this.set("continue_from", id)));
  }

  drawMore() {
    const text = (name, label, placeholder) => {
      const value = this.shot[name] ?? "";
      const isText = typeof value === "string";
      const shown = isText ? value : [value].flat().map((each) => each.text ?? each).join(" / ");
      const input = h("input", {
        value: shown, placeholder, readonly: !isText, oninput: () => this.set(name, input.value),
      });
      return field(label, input, isText ? null : "It has times of its own: change it as text.");
    };
    const one = (value, key) => (typeof value === "object" ? value?.[key] : value);
    const picture = new DropZone({
      name: "first_frame", label: "First frame", accept: "image/*",
      given: typeof this.shot.first_frame === "string" ? this.shot.first_frame : null,
      onchange: (file) => this.set("first_frame", file && this.editor.attach(file)),
    });
    return h("details", {}, h("summary", {}, "Camera, sound, texts"), h("div.stack", {},
      h("div.pair", {},
        this.choice("Camera", [["", "as it comes"], ...CAMERA_MOVES.map((name) => [name, name])],
          one(this.shot.camera, "move"), (name) => this.set("camera", name)),
        this.choice("Transition into it", [["", "film’s"], ...TRANSITIONS.map((name) => [name, name])],
          one(this.shot.transition, "type"), (name) => this.set("transition", name))),
      text("narration", "Narration", "spoken over it"),
      text("caption", "Caption", "text in the picture"),
      text("negative", "Leave out", "what is not to be seen"),
      h("div.pair", {},
        this.numberField("steps", "Steps", { min: 1, step: 1, placeholder: "model’s" }),
        this.numberField("guidance", "Guidance", { placeholder: "model’s" })),
      picture.element));
  }

  /** A seed that no take had yet, and only this shot made again. */
  newTake() {
    this.seed.querySelector("input").value = this.shot.seed = newSeed();
    this.editor.changed();
    this.editor.renderAgain();
  }

  /** The take that was looked at stays, whatever the choice was. */
  keepTake(seed) {
    this.shot.seed = seed;
    delete this.shot.takes;
    this.editor.redraw(this.shot);
    this.editor.changed();
    this.editor.renderAgain();
  }

  /**
   * Show what there is of it.
   * @param {object|null} film in which it was made, or is being made.
   * @param {object|null} made the film's shot.
   * @param {boolean} isChanged whether it was changed since.
   */
  show(index, film, made, isChanged) {
    this.number.textContent = index + 1;
    const isDraft = film?.draft && made?.status === "completed";
    const state = !made ? "new" : isChanged ? "changed" : isDraft ? "draft" : made.status;
    this.state.textContent = STATES[state];
    this.state.dataset.state = state;
    this.again.hidden = made?.status !== "completed";
    const isThere = made?.status === "completed";
    const image = state === "in_progress" && previewOf(film.id);
    const now = isThere ? `${film.id} ${made.id}` : `${state} ${Boolean(image)}`;
    if (now !== this.shown) {
      this.shown = now;
      if (film) shapeLike(this.picture, film);
      this.picture.replaceChildren(isThere ? this.drawCover(film, made)
        : image ? h("img", { alt: "How it looks so far" }) : h("p.fate", {}, this.state.textContent));
      this.takes.replaceChildren(...(isThere ? this.drawTakes(film, made) : []));
    }
    if (image) this.picture.querySelector("img").src = image;
  }

  /** The picture of a shot, or of one of its takes, which plays when it is pressed. */
  drawCover(film, made, take = null) {
    const name = take === null ? `shot ${made.id}` : `take ${take} of shot ${made.id}`;
    const cover = button({
      label: `Play ${name}`, class: "cover",
      onclick: () => {
        const video = h("video", {
          src: contentOfShot(film, made, "video", take), controls: true, loop: true,
          playsinline: true, "aria-label": name,
        });
        this.picture.replaceChildren(video);
        video.focus();
        if (!reducedMotion()) video.play().catch(() => {});
      },
    });
    cover.append(
      h("img", { src: contentOfShot(film, made, "thumbnail", take), alt: "", loading: "lazy" }),
      icon("play"));
    return cover;
  }

  drawTakes(film, made) {
    const findings = (made.checks?.findings ?? []).map((each) => h("p.warning", {}, each.text));
    const takes = made.choice?.takes ?? [];
    if (takes.length < 2) return findings;
    return [...findings, h("fieldset", {},
      h("legend", {}, `Best of ${takes.length} takes`),
      h("ul", {}, takes.map((take) => h("li", {},
        this.drawCover(film, made, take.seed),
        h("span", {}, h("b", {}, `Seed ${take.seed}`), take.seed === made.seed ? " (kept)" : "", `: ${take.reasons.join("; ")}`),
        take.seed !== made.seed && button({
          words: "Keep this one", class: "small", onclick: () => this.keepTake(take.seed),
        })))))];
  }
}
