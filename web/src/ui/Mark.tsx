/** The whale. Its pleated throat is the rorqual's own: it takes in a sea and keeps what feeds it. The
 *  same drawing is public/mark.svg, the page's icon. */
export function Mark({ size = 28 }: { size?: number }) {
  return (
    <svg className="mark" width={size} height={size} viewBox="0 0 64 64" aria-hidden="true">
      <path
        className="body"
        d="M3 33C5 22 17 15.5 31 17c8 .9 13.5 4.5 18 5.6 3.2.8 4.8-1.1 4.6-4.1-.2-2.8-1.6-5.2-.5-8.1 3.2.6 5.7 2.8 6.7 6 1.3-2 2.3-2.9 3.8-3.3.6 6.4-1.2 12.9-5.3 18C52.5 38.5 43 46.5 28 48.5 14 50.3 1.5 44 3 33z"
      />
      <path className="pleats" d="M6.5 37.5c9 3 18.5 3.2 27 .3M9 42c7.5 2.3 15.5 2.3 22.5.1M14.5 45.9c4.8 1 9.7.9 14.2-.2" />
      <path className="fin" d="M33 37.5c1.5 6.5 5 12.5 10.5 16.5 1.8-5.5 1-12-1.7-17.5z" />
      <circle className="eye" cx="18.5" cy="31" r="1.9" />
    </svg>
  );
}
