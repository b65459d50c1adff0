/** Keys that a drawing answers. */

/** Returns a listener that calls what belongs to a key and keeps the page from scrolling; other keys do as always. */
export function keys(actions) {
  return (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in actions)) return;
    event.preventDefault();
    actions[event.key]();
  };
}
