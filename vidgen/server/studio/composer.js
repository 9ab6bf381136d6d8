// The form that a clip is asked for with. Fields are named as the API names them.
import { post } from "./api.js";
import { DropZone } from "./drop.js";
import { button, field, h, icon } from "./dom.js";
import { put } from "./store.js";
import { announce, clearFormError, showFormError } from "./tell.js";

const PICTURES = "image/*";

export class Composer {
  /**
   * @param {object} model as `theModel` returns it.
   * @param {(job: object) => void} onmade called with each clip that is queued.
   */
  constructor(model, onmade) {
    this.model = model;
    this.onmade = onmade;
    this.source = null; // a clip of the gallery that is to be re-imagined
    this.first = new DropZone({ name: "image_reference", label: "First frame", accept: PICTURES });
    this.last = new DropZone({ name: "last_image_reference", label: "Last frame", accept: PICTURES });
    this.clip = new DropZone({
      name: "video_reference", label: "Clip to re-imagine", accept: "video/*",
      onchange: () => this.showSource(null),
    });
    this.track = new DropZone({ name: "audio_reference", label: "Sound file", accept: "audio/*,video/*" });
    this.element = this.draw();
    this.showSound();
    this.showSource(null);
  }

  draw() {
    this.prompt = h("textarea", {
      name: "prompt", rows: 3, required: true, enterkeyhint: "send", autocomplete: "off",
      placeholder: "a red car drives to the right through the desert at sunset",
      "aria-keyshortcuts": "/ n Control+Enter",
    });
    this.submit = h("button.main.wide", { type: "submit" }, icon("play"), "Make clip", h("kbd", {}, "Ctrl ⏎"));
    this.form = h("form.composer.panel", {
      id: "compose", novalidate: true, "aria-label": "New clip",
      onsubmit: (event) => { event.preventDefault(); this.send(); },
    },
      field("Prompt", this.prompt),
      this.drawSeed(),
      h("div.pair", {}, this.drawLength(), this.drawSize()),
      h("div.pair", {}, this.first.element, this.last.element),
      this.drawSound(),
      this.drawMore(),
      h("div", { "data-errors": true }),
      this.submit);
    return this.form;
  }

  drawSeed() {
    this.seed = h("input", {
      name: "seed", type: "number", min: 0, step: 1, placeholder: "random", inputmode: "numeric",
      oninput: () => this.lockSeed(this.seed.value !== ""),
    });
    this.lock = button({ class: "toggle", onclick: () => this.toggleLock() });
    this.lockSeed(false);
    const row = field("Seed", this.seed);
    row.append(this.lock);
    row.classList.add("seed");
    return row;
  }

  drawLength() {
    const known = this.model.defaults;
    return field("Seconds", h("input", {
      name: "seconds", type: "number", min: 0.1, step: "any", inputmode: "decimal",
      placeholder: Number(known.seconds).toFixed(2).replace(/\.?0+$/, ""),
    }));
  }

  drawSize() {
    const known = this.model.defaults;
    const sizes = [...new Set([known.size, ...(known.sizes ?? [])])];
    const list = h("datalist", { id: "sizes" }, sizes.map((size) => h("option", { value: size })));
    const box = field("Size", h("input", {
      name: "size", list: "sizes", placeholder: known.size, autocomplete: "off", spellcheck: "false",
    }));
    box.append(list);
    return box;
  }

  drawSound() {
    const options = [["", "No sound"], ["file", "A sound file"], ["say", "Spoken words"]];
    if (this.model.makes_sound) options.splice(1, 0, ["generate", "The model’s own"]);
    this.sound = h("select", { name: "sound", onchange: () => this.showSound() },
      options.map(([value, words]) => h("option", { value }, words)));
    this.speech = h("div.pair.say", {},
      field("Words to speak", h("input", { name: "say", autocomplete: "off" })),
      field("Voice", h("input", { name: "voice", placeholder: "en-gb", autocomplete: "off", spellcheck: "false" })));
    return h("div.stack", {}, field("Sound", this.sound), this.speech, this.track.element);
  }

  drawMore() {
    const known = this.model.defaults;
    const number = (name, label, attributes) => field(label, h("input", {
      name, type: "number", step: "any", inputmode: "decimal", ...attributes,
    }));
    this.strength = h("input", { name: "strength", type: "range", min: 0, max: 1, step: 0.05, value: 0.7 });
    this.strengthRow = field("Strength", this.strength, "0 keeps the clip, 1 ignores it.");
    this.chosen = h("p.chosen", { hidden: true });
    const loras = (this.model.loras ?? []).length > 0 && field("Adapter", h("select", { name: "lora" },
      h("option", { value: "" }, "None"), this.model.loras.map((name) => h("option", {}, name))));
    this.more = h("details", {},
      h("summary", {}, "More"),
      h("div.stack", {},
        h("div.triple", {},
          number("num_inference_steps", "Steps", { min: 1, max: 200, step: 1, placeholder: known.num_inference_steps }),
          number("guidance_scale", "Guidance", { min: 0, max: 20, placeholder: known.guidance_scale }),
          number("fps", "Frames a second", { min: 1, placeholder: known.fps })),
        field("Leave out", h("input", { name: "negative_prompt", autocomplete: "off", placeholder: "what is not to be seen" })),
        loras,
        this.clip.element, this.chosen, this.strengthRow));
    return this.more;
  }

  showSound() {
    this.speech.hidden = this.sound.value !== "say";
    this.track.element.hidden = this.sound.value !== "file";
  }

  /** Show which clip of the gallery is to be re-imagined; null: none of it. */
  showSource(job) {
    this.source = job;
    this.strengthRow.hidden = !(job || this.clip.file);
    this.chosen.hidden = !job;
    this.clip.element.hidden = Boolean(job);
    this.chosen.replaceChildren("Re-imagines “", job?.prompt ?? "", "” ", button({
      words: "Don’t", class: "small", onclick: () => { this.showSource(null); this.prompt.focus(); },
    }));
  }

  toggleLock() {
    if (this.isLocked) {
      this.seed.value = "";
      this.lockSeed(false);
    } else {
      this.seed.value ||= this.lastSeed ?? Math.floor(Math.random() * 2 ** 31);
      this.lockSeed(true);
    }
    announce(this.isLocked ? `Seed ${this.seed.value} is locked` : "Each clip draws its own seed");
  }

  get isLocked() {
    return this.lock.getAttribute("aria-pressed") === "true";
  }

  lockSeed(locked) {
    this.lock.setAttribute("aria-pressed", locked);
    this.lock.title = locked ? "Draw a new seed for each clip" : "Keep this seed";
    this.lock.replaceChildren(icon(locked ? "lock" : "unlock"), h("span", {}, locked ? "Locked" : "Lock"));
  }

  /** Know the seed of the clip that is looked at, which the lock takes. */
  offerSeed(seed) {
    this.lastSeed = seed;
    if (!this.isLocked) this.seed.placeholder = seed == null ? "random" : `random (last ${seed})`;
  }

  /** Fill the form with what a clip was asked with. */
  use(job) {
    const elements = this.form.elements;
    elements.prompt.value = job.prompt;
    elements.seconds.value = job.seconds;
    elements.size.value = job.size;
    elements.num_inference_steps.value = job.num_inference_steps;
    elements.guidance_scale.value = job.guidance_scale ?? "";
    elements.negative_prompt.value = job.negative_prompt ?? "";
    elements.fps.value = Number.isInteger(Number(job.fps)) ? job.fps : "";
    this.seed.value = job.seed ?? "";
    this.lockSeed(job.seed != null);
    this.prompt.focus();
  }

  /** Re-imagine a clip of the gallery. */
  reimagine(job) {
    this.clip.take(null);
    this.prompt.value = job.prompt;
    this.showSource(job);
    this.more.open = true;
    this.prompt.focus();
    this.prompt.select();
  }

  fields() {
    const { sound, ...given } = Object.fromEntries(
      [...new FormData(this.form)].map(([name, value]) => [name, value instanceof File ? null : value.trim()]));
    const speaks = sound === "say";
    const again = this.source ? { id: this.source.id } : this.clip.file;
    return {
      ...given,
      say: speaks ? given.say : null,
      voice: speaks ? given.voice : null,
      generate_sound: sound === "generate" ? true : null,
      audio_reference: sound === "file" ? this.track.file : null,
      image_reference: this.first.file,
      last_image_reference: this.last.file,
      video_reference: again,
      strength: again ? this.strength.value : null,
    };
  }

  async send() {
    if (this.submit.getAttribute("aria-disabled") === "true") return;
    clearFormError(this.form);
    // A disabled button would lose the focus, so it is only marked as disabled.
    this.submit.setAttribute("aria-disabled", "true");
    try {
      const job = await post("/v1/videos", this.fields());
      put(job);
      this.onmade(job);
    } catch (error) {
      showFormError(this.form, error);
    } finally {
      this.submit.removeAttribute("aria-disabled");
    }
  }
}
