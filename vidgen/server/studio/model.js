// The model of this server: asked once, waited for while it is being opened.
import { get } from "./api.js";

const PAUSE_MS = 2000;
let asked = null;

/** The model's abilities: `id`, `defaults`, `limits`, `tasks`, `loras`, `makes_sound`, `voices`. */
export function theModel() {
  asked ??= ask();
  return asked;
}

async function ask() {
  for (;;) {
    try {
      return (await get("/v1/models")).data[0];
    } catch (error) {
      if (error.status === 401) throw error;
      await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
    }
  }
}
