// A place for a file: clicked, dropped on or pasted into.
import { button, h, icon, newId } from "./dom.js";
import { announce } from "./tell.js";

/**
 * @param {object} options `name` of the field, `label`, `accept` as of an input, `hint`; `given`,
 *     the name of a file that is known already.
 */
export class DropZone {
  constructor({ name, label, accept, hint, given = null, onchange = () => {} }) {
    this.file = null;
    this.given = given;
    this.label = label;
    this.onchange = onchange;
    this.isPicture = accept.startsWith("image/");
    const id = newId("drop");
    this.input = h("input.unseen", {
      type: "file", id, name, accept, onchange: () => this.take(this.input.files[0] ?? null),
    });
    this.shown = h("span.shown");
    this.clear = button({
      symbol: "cancel", label: `Remove ${label.toLowerCase()}`, class: "quiet clear",
      onclick: () => { this.take(null); this.input.focus(); },
    });
    this.element = h("div.drop", {},
      this.input,
      h("label", { for: id }, this.shown, h("span.name", {}, label), hint && h("small", {}, hint)),
      this.clear);
    this.listen(accept);
    this.draw();
  }

  listen(accept) {
    const suits = (file) => accept.split(",").some((kind) => file.type.startsWith(kind.replace("*", "")));
    const over = (event) => {
      event.preventDefault();
      this.element.classList.toggle("over", event.type === "dragover");
    };
    this.element.addEventListener("dragover", over);
    this.element.addEventListener("dragleave", over);
    this.element.addEventListener("drop", (event) => {
      over(event);
      const file = [...event.dataTransfer.files].find(suits);
      if (file) this.take(file);
    });
    this.element.addEventListener("paste", (event) => {
      const file = [...event.clipboardData.files].find(suits);
      if (file) this.take(file);
    });
  }

  /** Take a file; null removes the present one. */
  take(file) {
    if ((this.file || this.given) && !file) announce(`${this.label} removed`);
    this.file = file;
    this.given = null;
    if (!file) this.input.value = "";
    this.draw();
    this.onchange(file);
  }

  draw() {
    const { file } = this;
    const name = file?.name ?? this.given;
    this.clear.hidden = !name;
    this.element.classList.toggle("full", Boolean(name));
    if (this.url) URL.revokeObjectURL(this.url);
    this.url = file && this.isPicture ? URL.createObjectURL(file) : null;
    const picture = this.url ? h("img", { src: this.url, alt: "" }) : icon(this.isPicture ? "image" : "open");
    this.shown.replaceChildren(picture, name ? h("span.filename", {}, name) : "");
  }
}
