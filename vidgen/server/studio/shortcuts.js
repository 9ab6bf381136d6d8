// Keys of the page: one table, which both the page and its help read.
import { openDialog } from "./dialog.js";
import { h, isTyping } from "./dom.js";

const OFF = "vidgen.keys-off";

/** Keys and their actions; `keys` are shown, `match` returns true for the key's event. */
export class Shortcuts {
  /** @param {{key: string, words: string, run: Function, view?: string}[]} table */
  constructor(table, viewOf) {
    this.table = table;
    this.viewOf = viewOf;
    addEventListener("keydown", (event) => this.onKey(event));
  }

  onKey(event) {
    if (event.defaultPrevented || event.isComposing || document.querySelector("dialog[open]")) return;
    const withControl = event.ctrlKey || event.metaKey;
    if (event.altKey || (!withControl && (isTyping(event.target) || localStorage.getItem(OFF)))) return;
    const isPressed = event.target.closest?.("button, a, summary, video, [type=range], [type=checkbox]");
    if (isPressed && [" ", "Enter", "ArrowLeft", "ArrowRight"].includes(event.key) && !withControl) return;
    const name = withControl ? `Ctrl+${event.key}` : event.key;
    const found = this.table.find(
      (each) => each.keys.includes(name) && (!each.view || each.view === this.viewOf()));
    if (!found) return;
    event.preventDefault();
    found.run();
  }

  /** Show all keys. */
  help() {
    const rows = this.table.map(({ keys, words }) => h("li", {},
      h("span", {}, keys.flatMap((key) => [h("kbd", {}, key === " " ? "Space" : key.replace("+", " + ")), " "])),
      h("span", {}, words)));
    const toggle = h("input", {
      type: "checkbox", checked: !localStorage.getItem(OFF),
      onchange: () => {
        if (toggle.checked) localStorage.removeItem(OFF);
        else localStorage.setItem(OFF, "1");
      },
    });
    return openDialog("Keyboard", [
      h("label.check", {}, toggle, " Single keys act outside of fields"),
      h("ul.keys", {}, rows),
    ], { wide: true });
  }
}
