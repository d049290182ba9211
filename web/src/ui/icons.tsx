/** The icons: 24 units, drawn with the text's colour. */
const PATHS = {
  plus: "M12 5v14M5 12h14",
  panel: "M4 5h16v14H4zM9.5 5v14",
  gear: "M4 7h9M19 7h1M4 17h1M11 17h9M13 7a3 3 0 1 0 6 0 3 3 0 1 0-6 0M5 17a3 3 0 1 0 6 0 3 3 0 1 0-6 0",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 1 0 0-8M12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5z",
  trash: "M4.5 7h15M9.5 7V4.5h5V7M6.5 7l.8 12.5h9.4L17.5 7M10.2 11v5M13.8 11v5",
  edit: "M5 19l.8-3.8L16 5l3 3L8.8 18.2zM13.8 7.2l3 3",
  copy: "M8.5 8.5h11v11h-11zM5.5 15.5h-1v-11h11v1",
  check: "M5 12.5l4.5 4.5L19 7.5",
  again: "M19.5 12a7.5 7.5 0 1 1-2.2-5.3L19.5 9M19.5 4.5V9H15",
  up: "M12 19V5.5M6 11.5l6-6 6 6",
  down: "M12 5v13.5M6 12.5l6 6 6-6",
  chevron: "M7 10l5 5 5-5",
  think:
    "M18.7 18.7A9.5 4.3 45 1 1 5.3 5.3 9.5 4.3 45 1 1 18.7 18.7zM18.7 5.3A9.5 4.3-45 1 1 5.3 18.7 9.5 4.3-45 1 1 18.7 5.3zM12 11.8v.4",
  warn: "M12 8.5v4.5M12 16v.3M12 3.5a8.5 8.5 0 1 0 0 17 8.5 8.5 0 1 0 0-17",
} as const;

export function Icon({ name, size = 18 }: { name: keyof typeof PATHS; size?: number }) {
  return (
    <svg className="icon" width={size} height={size} viewBox="0 0 24 24" aria-hidden="true">
      <path d={PATHS[name]} />
    </svg>
  );
}
