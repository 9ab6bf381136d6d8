// A film's script as plain data: read, changed, compared. Nothing here touches the page.

/** Allowed values of these two; a test compares them with the engine's. */
export const CAMERA_MOVES = [
  "static", "pan-left", "pan-right", "tilt-up", "tilt-down", "zoom-in", "zoom-out", "dolly-in",
  "dolly-out", "truck-left", "truck-right", "orbit-left", "orbit-right", "handheld",
];
export const TRANSITIONS = [
  "cut", "dissolve", "fade-black", "fade-white", "wipe-left", "wipe-right", "slide-left", "slide-right",
];
/** Values that may be written in short: the key that stands for the whole, and what the others are then. */
const SHORT = {
  camera: ["move", { strength: 0.5 }],
  transition: ["type", { duration: 0.5 }],
  narration: ["text", {}],
  caption: ["text", { at: 0 }],
  sound: ["effects", { gain_db: 0, loop: false }],
  music: ["file", { gain_db: 0, loop: true }],
  first_frame: [null, { frame: "last" }],
  last_frame: [null, { frame: "last" }],
};

/** A film of one empty shot. */
export function newScript() {
  return { version: 1, project: { title: "", seed: newSeed() }, shots: [newShot([])] };
}

export function newSeed() {
  return Math.floor(Math.random() * 2 ** 31);
}

/** A shot whose id none of the others has. */
export function newShot(shots, like = { prompt: [{ prompt: "", at: 0 }] }) {
  const taken = new Set(shots.map((shot) => shot.id));
  let number = shots.length + 1;
  while (taken.has(`shot-${number}`)) number += 1;
  return { ...structuredClone(like), id: `shot-${number}` };
}

/** A script as it came, in the shape that the editor works on. */
export function opened(script) {
  const made = pruned(structuredClone(script));
  made.project ??= {};
  delete made.project.model; // the service has its own
  made.shots = (made.shots ?? []).map((shot) => openedShot(shot));
  const named = [];
  for (const shot of made.shots) {
    shot.id ||= newShot([...named, ...made.shots]).id;
    named.push(shot);
  }
  return made;
}

/** A shot with its prompts as a list, and all else as short as possible. */
function openedShot(shot) {
  const made = { ...shot, prompt: promptsOf(shot.prompt) };
  if (made.in_film === true) delete made.in_film;
  for (const name of Object.keys(SHORT)) {
    if (made[name] !== undefined) made[name] = shortened(made[name], ...SHORT[name]);
  }
  return made;
}

function shortened(value, key, usual) {
  if (Array.isArray(value)) {
    const all = value.map((each) => shortened(each, key, usual));
    return all.length === 1 ? all[0] : all;
  }
  if (typeof value !== "object") return value;
  const kept = Object.entries(value).filter(([name, inner]) => usual[name] !== inner);
  return kept.length === 1 && kept[0][0] === key ? kept[0][1] : Object.fromEntries(kept);
}

function promptsOf(prompt) {
  return [prompt].flat().map((each) => (typeof each === "string" ? { prompt: each, at: 0 } : each));
}

/** The script as it is sent: without what is empty. */
export function closed(script) {
  const made = pruned(structuredClone(script));
  made.shots = script.shots.map((shot) => closedShot(shot));
  return made;
}

function closedShot(shot) {
  const made = pruned(structuredClone(shot));
  made.prompt = shot.prompt.map(({ prompt, at }) => (at ? { prompt, at } : prompt));
  if (made.prompt.length === 1) made.prompt = made.prompt[0];
  return made;
}

/** Values without null, empty text, empty lists and empty objects. */
function pruned(value) {
  if (Array.isArray(value)) return value.map(pruned);
  if (value === null || typeof value !== "object") return value;
  const kept = Object.entries(value).map(([name, inner]) => [name, pruned(inner)])
    .filter(([, inner]) => inner !== null && inner !== "" && !isEmpty(inner));
  return Object.fromEntries(kept);
}

function isEmpty(value) {
  return typeof value === "object" && value !== null && Object.keys(value).length === 0;
}

/** Project values that shape the pixels of every shot. */
function frameOf(script) {
  const { fps, size, seed, style, defaults } = closed(script).project ?? {};
  return JSON.stringify([fps, size, seed, style, defaults, script.characters, script.places, script.scenes]);
}

/**
 * Ids of new and changed shots, and of those that continue one of them.
 * @param {object} now the editor's script.
 * @param {object|null} before as the film was made of, opened; null: nothing was made.
 */
export function changedShots(now, before) {
  if (!before || frameOf(now) !== frameOf(before)) return new Set(now.shots.map((shot) => shot.id));
  const made = new Map(before.shots.map((shot) => [shot.id, JSON.stringify(seen(shot))]));
  const changed = new Set(
    now.shots.filter((shot) => made.get(shot.id) !== JSON.stringify(seen(shot))).map((shot) => shot.id));
  for (let size = -1; size !== changed.size;) {
    size = changed.size;
    for (const shot of now.shots) {
      if (needsOf(shot).some((id) => changed.has(id))) changed.add(shot.id);
    }
  }
  return changed;
}

/** A shot's values that shape its pixels, in one order. */
function seen(shot) {
  const { transition, caption, narration, music, sound, in_film, ...pixels } = closedShot(shot);
  return Object.fromEntries(Object.entries(pixels).sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** Ids of the shots that a shot continues or shows a frame of. */
export function needsOf(shot) {
  return [shot.continue_from, shot.first_frame?.shot, shot.last_frame?.shot].filter(Boolean);
}

/** Remove a shot, and references to it. */
export function withoutShot(script, id) {
  const shots = script.shots.filter((shot) => shot.id !== id);
  for (const shot of shots) {
    if (shot.continue_from === id) delete shot.continue_from;
    if (shot.first_frame?.shot === id) delete shot.first_frame;
    if (shot.last_frame?.shot === id) delete shot.last_frame;
  }
  return { ...script, shots };
}
