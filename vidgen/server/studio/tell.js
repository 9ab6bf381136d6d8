// Messages: toasts for mistakes, a live region for progress, messages at fields.
import { button, h } from "./dom.js";

const TOAST_MS = 9000;

/** Say something to those who listen rather than look. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Show something that went wrong, or that was done, for a while. */
export function toast(text, kind = "error") {
  const close = button({ symbol: "cancel", label: "Close", class: "quiet" });
  const element = h("div.toast", { "data-kind": kind }, h("span", {}, text), close);
  const remove = () => element.remove();
  close.addEventListener("click", remove);
  setTimeout(remove, TOAST_MS);
  document.getElementById("toasts").append(element);
}

/** Do something that may fail; what went wrong is shown and undefined comes back. */
export async function attempt(work) {
  try {
    return await work();
  } catch (error) {
    toast(error.message);
    return undefined;
  }
}

/**
 * Show an error of the API at the field that it is about, else above the form's buttons.
 * @param {HTMLFormElement} form
 * @param {Error & {param?: string}} error
 */
export function showFormError(form, error) {
  clearFormError(form);
  const named = error.param?.split(/[[.]/)[0];
  const input = named ? form.elements.namedItem(named) : null;
  const message = h("p.wrong", { role: "alert", id: `${form.id}-wrong` }, error.message);
  const box = input instanceof Element ? input.closest(".field, .drop") : null;
  if (!box) {
    form.querySelector("[data-errors]").append(message);
    return;
  }
  const folded = box.closest("details");
  if (folded) folded.open = true;
  box.append(message);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-errormessage", message.id);
  input.focus();
}

/** Take the last error away. */
export function clearFormError(form) {
  for (const message of form.querySelectorAll(".wrong")) message.remove();
  for (const input of form.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-errormessage");
  }
}
