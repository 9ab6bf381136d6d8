// A prompt of which one word can be changed in place.
import { h } from "./dom.js";
import { splitWords } from "./words.js";

/**
 * Words as buttons; the one that is pressed becomes a field.
 * @param {string} text
 * @param {(prompt: string) => Promise<boolean>} onchange with the new prompt; false leaves the field.
 */
export function changeablePrompt(text, onchange) {
  const words = splitWords(text);
  const buttonOf = (index) => h("button.word", {
    type: "button", title: "Change this word", onclick: (event) => edit(index, event.currentTarget),
  }, words[index]);

  function edit(index, place) {
    const word = words[index];
    const fit = (input) => { input.size = Math.max(input.value.length, 4); };
    const input = h("input.word", {
      value: word, spellcheck: "false", autocomplete: "off",
      "aria-label": `Another word for ${word}; Enter makes the clip, Escape leaves it`,
      oninput: () => fit(input),
    });
    const leave = ({ focus }) => {
      if (!input.isConnected) return;
      const there = buttonOf(index);
      input.replaceWith(there);
      if (focus) there.focus();
    };
    input.addEventListener("keydown", async (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        leave({ focus: true });
      }
      if (event.key !== "Enter" || event.isComposing) return;
      event.preventDefault();
      const prompt = words.toSpliced(index, 1, input.value.trim()).filter(Boolean).join(" ");
      if (prompt === words.join(" ") || !prompt) leave({ focus: true });
      else if (await onchange(prompt)) leave({ focus: false });
    });
    input.addEventListener("blur", () => { if (input.value === word) leave({ focus: false }); });
    fit(input);
    place.replaceWith(input);
    input.focus();
    input.select();
  }

  const element = h("p.prompt", { role: "group", "aria-label": "Prompt; press a word to change it" },
    words.flatMap((_, index) => [buttonOf(index), " "]));
  return { element, start: () => element.querySelector("button.word")?.focus() };
}

/** A prompt in which the words that another one lacks are marked. */
export function markedPrompt(parts) {
  return h("p.prompt", {}, parts.flatMap(({ word, same }) => [same ? word : h("mark", {}, word), " "]));
}
