// The API key, where the service wants one: kept for this tab, sent as a cookie for pictures, too.
import { field, h } from "./dom.js";
import { openDialog } from "./dialog.js";
import { clearFormError, showFormError } from "./tell.js";

const STORE = "vidgen.key";
let asking = null;

/** The header that shows the key, if there is one. */
export function authorization() {
  const key = sessionStorage.getItem(STORE);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** At the page's start: use the key of this tab, or ask for one where one is needed. */
export async function openSession() {
  const session = await (await fetch("/v1/session", { headers: authorization() })).json();
  if (!session.key_required) return;
  const kept = sessionStorage.getItem(STORE);
  if (kept ? !(await accepts(kept)) : !session.authenticated) await askForKey();
}

/** Ask for a key until one is taken; several callers share one dialog. False: it was left. */
export function askForKey() {
  asking ??= ask().finally(() => { asking = null; });
  return asking;
}

function ask() {
  const input = h("input", {
    type: "password", name: "key", autocomplete: "off", spellcheck: "false", required: true,
    placeholder: "vg-…",
  });
  return openDialog(
    "This service needs a key",
    [
      h("p", {}, "Whoever runs it has drawn one with vidgen serve --new-key NAME."),
      field("API key", input, "Kept until this tab is closed."),
    ],
    {
      submit: "Go on",
      onsubmit: async (form) => {
        clearFormError(form);
        if (await accepts(input.value.trim())) return true;
        showFormError(form, { message: "The service doesn't know this key.", param: "key" });
        return false;
      },
    },
  );
}

async function accepts(key) {
  const response = await fetch("/v1/session", {
    method: "POST", headers: { Authorization: `Bearer ${key}` },
  });
  if (response.ok) sessionStorage.setItem(STORE, key);
  else sessionStorage.removeItem(STORE);
  return response.ok;
}
