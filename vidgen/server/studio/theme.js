// Sets light, dark or the system's colours before the page is drawn, so that nothing flashes.
{
  const CHOICES = ["auto", "light", "dark"];
  const saved = localStorage.getItem("vidgen.theme");
  const root = document.documentElement;
  root.dataset.theme = CHOICES.includes(saved) ? saved : "auto";

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const draw = () => {
      const now = root.dataset.theme;
      const words = { auto: "as the system's", light: "light", dark: "dark" }[now];
      button.setAttribute("aria-label", `Colours: ${words}`);
      button.title = `Colours: ${words}`;
      button.innerHTML = `<svg class="icon" aria-hidden="true"><use href="/studio/icons.svg#${now}"/></svg>`;
    };
    button.addEventListener("click", () => {
      root.dataset.theme = CHOICES[(CHOICES.indexOf(root.dataset.theme) + 1) % CHOICES.length];
      localStorage.setItem("vidgen.theme", root.dataset.theme);
      draw();
    });
    draw();
  });
}
