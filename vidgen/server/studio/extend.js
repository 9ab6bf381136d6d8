// A dialog to extend a clip.
import { post } from "./api.js";
import { openDialog } from "./dialog.js";
import { field, h } from "./dom.js";
import { put } from "./store.js";
import { clearFormError, showFormError } from "./tell.js";
import { lengthOf } from "./words.js";

/** Ask for an extension's prompt and length; return the queued clip, or null. */
export async function askToExtend(job) {
  const length = h("input", {
    name: "seconds", type: "number", min: 0.1, step: "any", value: "2", inputmode: "decimal",
    autofocus: true,
  });
  const prompt = h("textarea", { name: "prompt", rows: 3, value: job.prompt });
  const steps = h("input", {
    name: "num_inference_steps", type: "number", min: 1, max: 200, value: job.num_inference_steps,
  });
  let made = null;
  await openDialog("Let it go on", [
    field("Seconds more", length, `It has ${lengthOf(job)} now; the new clip holds both.`),
    field("What happens then", prompt),
    field("Steps", steps),
  ], {
    submit: "Extend",
    onsubmit: async (form) => {
      clearFormError(form);
      try {
        made = await post("/v1/videos/extensions", {
          prompt: prompt.value, seconds: length.value, num_inference_steps: steps.value,
          video: { id: job.id },
        });
        put(made);
        return true;
      } catch (error) {
        showFormError(form, error);
        return false;
      }
    },
  });
  return made;
}
