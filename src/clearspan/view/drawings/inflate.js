/** What the page keeps compressed: gzip written as base64 in an element's text. */

/** Returns the bytes kept in the element with this id, as an ArrayBuffer. */
export async function inflate(id) {
  const text = atob(document.getElementById(id).textContent.trim());
  const bytes = Uint8Array.from(text, (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}
