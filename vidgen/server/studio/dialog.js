// Dialogs of the browser's own: they hold the focus and give it back.
import { h, newId } from "./dom.js";

/**
 * Open a dialog with a form in it.
 * @param {string} title
 * @param {Node[]} content
 * @param {object} options `submit` names the main button, `cancel` the other one; `onsubmit` may
 *     return false to leave the dialog open; `danger` marks what can't be undone.
 * @returns {Promise<boolean>} whether the main button ended it.
 */
export function openDialog(title, content, options = {}) {
  const { submit = null, cancel = submit ? "Cancel" : "Close", onsubmit, danger, wide } = options;
  const titleId = newId("dialog");
  let done = false;
  const form = h(
    "form",
    { method: "dialog", id: newId("form"), novalidate: true },
    h("h2", { id: titleId }, title),
    ...content,
    h("div", { "data-errors": true }),
    h(
      "div.actions.end",
      {},
      h("button", { type: "button", onclick: () => dialog.close() }, cancel),
      submit && h(danger ? "button.danger" : "button.main", { type: "submit" }, submit),
    ),
  );
  const dialog = h("dialog", { "aria-labelledby": titleId, class: wide ? "wide" : null }, form);
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (onsubmit && (await onsubmit(form)) === false) return;
    done = true;
    dialog.close();
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  document.body.append(dialog);
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(done);
    });
  });
}

/** Ask before something that can't be undone. */
export function confirmDialog(title, text, submit) {
  return openDialog(title, [h("p", {}, text)], { submit, cancel: "Keep", danger: true });
}
