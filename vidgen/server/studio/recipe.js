// The recipe of a clip: all that shaped it, to read, copy and keep.
import { get } from "./api.js";
import { openDialog } from "./dialog.js";
import { button, h } from "./dom.js";
import { announce, attempt } from "./tell.js";

const MAX_SHOWN = 120;

/** Show what made a clip. */
export async function showRecipe(job) {
  const recipe = await attempt(() => get(`/v1/videos/${job.id}/recipe`));
  if (!recipe) return;
  const text = JSON.stringify(recipe, null, 2);
  const file = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const copy = button({
    symbol: "copy", words: "Copy",
    onclick: async () => {
      await navigator.clipboard.writeText(text);
      announce("The recipe is copied");
    },
  });
  await openDialog("Recipe", [
    h("p", {}, "All that shaped this clip. The file carries it too: vidgen replay FILE makes the same frames."),
    h("div.recipe", { tabindex: 0, role: "region", "aria-label": "Recipe" }, tree(recipe)),
    h("div.actions", {}, navigator.clipboard && copy,
      h("a.button", { href: file, download: `${job.id}.recipe.json` }, "Save as JSON")),
  ], { wide: true });
  URL.revokeObjectURL(file);
}

/** Names and values, one below the other; what is nested stands further in. */
function tree(value) {
  if (value === null || typeof value !== "object") return h("code", {}, shortened(String(value)));
  const entries = Object.entries(value);
  if (Array.isArray(value) && value.every((each) => typeof each !== "object")) {
    return h("code", {}, shortened(value.join(", ") || "none"));
  }
  if (!entries.length) return h("code", {}, "none");
  return h("dl", {}, entries.flatMap(([name, inner]) => [h("dt", {}, name), h("dd", {}, tree(inner))]));
}

/** Pictures that a recipe embeds would fill the page. */
function shortened(text) {
  return text.length > MAX_SHOWN ? `${text.slice(0, MAX_SHOWN)}… (${text.length} characters)` : text;
}
