/** Colours of values. They come from the style sheet, so that drawings follow the reader's light or dark form. */

import { signal } from "@preact/signals";

/** Changes when the reader's system changes between light and dark; a drawing that reads it is drawn again. */
export const theme = signal("");

const dark = matchMedia("(prefers-color-scheme: dark)");
const palettes = new Map();

function changeTheme() {
  palettes.clear();
  theme.value = dark.matches ? "dark" : "light";
}
dark.addEventListener("change", changeTheme);
changeTheme();

/** Returns the value of a custom property of the page. */
export function style(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/**
 * Returns the 256 colours of a palette, each with the ink that is best read on it.
 * `heat` runs from 0 up, `sides` from both sides of 0; `glow` and `surprise` lie behind a text, and 0 has no colour.
 */
export function palette(name) {
  if (!palettes.has(name)) {
    const stops = stopsOf(name).map(channels);
    palettes.set(name, Array.from({ length: 256 }, (_, i) => shade(stops, (i / 255) * (stops.length - 1))));
  }
  return palettes.get(name);
}

/** Returns a palette as the background of an element, from left to right. */
export const gradient = (name) => `linear-gradient(to right, ${stopsOf(name).join(", ")})`;

const stopsOf = (name) => style(`--${name}`).split(" ");

/** Returns the colour of a value between two ends, or undefined where it is missing. */
export function colourOf(value, [low, high], colours) {
  if (!Number.isFinite(value)) return undefined;
  const share = (value - low) / (high - low || 1);
  return colours[Math.round(Math.min(Math.max(share, 0), 1) * 255)];
}

function shade(stops, place) {
  const before = Math.min(Math.floor(place), stops.length - 2);
  const mixed = stops[before].map((low, i) => Math.round(low + (place - before) * (stops[before + 1][i] - low)));
  return { ground: `rgb(${mixed.join(" ")})`, ink: luminance(mixed) > 0.179 ? "#000000" : "#ffffff" };
}

const channels = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

/** Returns the relative luminance of WCAG 2.2; at 0.179 black and white are read equally well, at 4.58 to 1. */
function luminance(colour) {
  const [red, green, blue] = colour.map((c) => (c <= 10 ? c / 3294 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
}
