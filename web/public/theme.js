// Sets the remembered theme before anything is painted; without one, CSS follows the system.
try {
  var theme = JSON.parse(localStorage.getItem("rorqual.settings") || "{}").theme;
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch (error) {
  // No storage, or a corrupt one: follow the system.
}
