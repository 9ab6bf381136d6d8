// Addresses after the #: which view is shown, and where the focus goes.

const openedAt = location.hash;
let onroute = null;

/** The view and its arguments: "#/clip/ID" is ["clip", "ID"]. */
export function route() {
  const parts = location.hash.replace(/^#\/?/, "").split("/").filter(Boolean);
  return parts.length ? parts.map(decodeURIComponent) : ["clips"];
}

/** Call back now, quietly unless a link was followed while the page began, and at each change. */
export function startRouter(callback) {
  onroute = callback;
  addEventListener("hashchange", () => {
    if (location.hash === "#main") return; // the skip link's
    onroute(route(), false);
  });
  onroute(route(), location.hash === openedAt);
}

/** Go to an address. */
export function go(...parts) {
  location.hash = `#/${parts.map(encodeURIComponent).join("/")}`;
}

/** Change the address and leave the focus and the place where they are. */
export function goQuietly(...parts) {
  history.replaceState(null, "", `#/${parts.map(encodeURIComponent).join("/")}`);
  onroute(route(), true);
}
