"""SafeFetcher against real servers: what it must refuse, whoever names it, and what every answer may cost."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import ssl
import zlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest
import trustme

from rorqual.errors import BackendUnavailable, FetchError
from rorqual.net import Fetched, Limits, SafeFetcher, ServiceClient, is_public
from tests.net.sites import Asked, Site, page, redirect

T = TypeVar("T")
PAGE = page("<p>krill</p>")


async def names(host: str, port: int) -> list[str]:
    """Every name under .test is this machine; nothing else is looked up."""
    if host.endswith((".test", "localhost")):
        return ["127.0.0.1"]
    raise OSError("no such name")


def fetcher(*sites: Site, **options: object) -> SafeFetcher:
    allowed = {(site.address, site.port) for site in sites}
    return SafeFetcher(**{"resolver": names, "allowed_for_tests": lambda *where: where in allowed} | options)  # type: ignore[arg-type]


async def refused(by: SafeFetcher, url: str) -> str:
    with pytest.raises(FetchError) as error:
        await by.fetch(url)
    return error.value.reason


def play(scene: Callable[[], Awaitable[T]]) -> T:
    return asyncio.run(asyncio.wait_for(scene(), 60))  # type: ignore[arg-type]


def with_site(answers: dict[str, object], act: Callable[[Site], Awaitable[T]]) -> T:
    async def scene() -> T:
        async with Site(answers) as site:  # type: ignore[arg-type]
            return await act(site)

    return play(scene)


# ---- addresses ----------------------------------------------------------------------------------------------------

INSIDE = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254",
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "192.0.2.1", "198.18.0.1", "198.51.100.7", "203.0.113.9", "224.0.0.1",
    "239.255.255.250", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.88.99.1",
    "::", "::1", "fe80::1", "fec0::1", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1", "100::1", "3fff::1",
    "64:ff9b:1::7f00:1", "5f00::1", "::127.0.0.1", "::8.8.8.8",
]  # fmt: skip
OUTSIDE = ["8.8.8.8", "1.1.1.1", "172.15.255.255", "172.32.0.1", "93.184.216.34", "2606:4700::1111", "2a00:1450::1"]


def disguises(v4: str) -> list[str]:
    """The IPv6 addresses that carry an IPv4 address: mapped, NAT64, 6to4, ISATAP, and Teredo as client and as server."""
    n = int(ipaddress.IPv4Address(v4))
    high = 0x2606_4700 << 96
    numbers = [
        0xFFFF << 32 | n,
        0x0064_FF9B << 96 | n,
        0x2002 << 112 | n << 80 | 1,
        high | 0x5EFE << 32 | n,
        0x2001_0000 << 96 | 0x0808_0808 << 64 | (n ^ 0xFFFFFFFF),
        0x2001_0000 << 96 | n << 64 | (0x0808_0808 ^ 0xFFFFFFFF),
    ]
    return [str(ipaddress.IPv6Address(x)) for x in numbers]


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_of_the_inside_are_not_public(address: str) -> None:
    assert not is_public(address)
    if ":" not in address:
        assert not any(map(is_public, disguises(address)))


@pytest.mark.parametrize("address", OUTSIDE)
def test_addresses_of_the_outside_are_public(address: str) -> None:
    """Also as mapped or NAT64, which are other spellings of the same address."""
    assert is_public(address)
    if ":" not in address:
        assert all(map(is_public, disguises(address)[:2]))


def test_what_is_no_address_is_not_public() -> None:
    assert not any(map(is_public, ["", "localhost", "2130706433", "0x7f000001", "127.1", "1.2.3", "fe80::1%eth0"]))


# ---- every spelling of this machine -------------------------------------------------------------------------------

SPELLINGS = [
    "127.0.0.1", "localhost", "localhost.", "2130706433", "017700000001", "0x7f000001", "0177.0.0.1", "0x7f.0.0.1", "127.1",
    "127.0.1", "0", "127.0.0.1.", "①②⑦.⓪.⓪.①", "127。0。0。1", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]", "[::127.0.0.1]", "[2002:7f00:1::1]", "[64:ff9b::7f00:1]", "[64:ff9b:1::7f00:1]",
    "[2001:0:808:808::80ff:fffe]", "[::1%25lo]", "[fe80::1%25lo]", "inside.test", "INSIDE.TEST", "%6cocalhost",
    "localhost%00.com", "user@127.0.0.1", "user:word@inside.test", "8.8.8.8@127.0.0.1",
    "127.0.0.1#@8.8.8.8", "8.8.8.8\\@127.0.0.1",
    " 127.0.0.1", "127.0.0.1\t", "127.0.0.1\r\nX-Injected: 1", "ex ample.test", "-.test", "", "[",
    "[::1", "a" * 300 + ".test",
]  # fmt: skip


@pytest.mark.parametrize("host", SPELLINGS)
def test_no_spelling_of_this_machine_reaches_a_server_on_it(host: str) -> None:
    """The system's own resolver, which understands all of them; the server counts connections."""

    async def resolver(name: str, port: int) -> list[str]:
        from rorqual.net import system_resolver

        return ["127.0.0.1"] if name.lower().endswith(".test") else await system_resolver(name, port)

    async def act(site: Site) -> None:
        by = SafeFetcher(resolver=resolver)
        assert await refused(by, f"http://{host}:{site.port}/") in ("address", "network")
        elsewhere = SafeFetcher(resolver=resolver, allowed_for_tests=lambda a, p: a == "203.0.113.1")
        assert await refused(elsewhere, f"http://{host}:{site.port}/") in ("address", "network")
        assert site.connections == 0

    with_site({"/": PAGE}, act)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host.test/", "file:///etc/passwd", "gopher://host.test/", "data:text/html,x", "javascript:alert(1)",
        "//host.test/",
        "host.test", "", "http:", "http://", "http:///etc/passwd", "http:host.test", "unix:///run/docker.sock", "ws://host.test/",
        "http://host.test/" + "a" * 8200, "http://host.test:99999/", "http://host.test:x/",
    ],
)  # fmt: skip
def test_schemes_and_shapes_that_are_refused_before_any_look_up(url: str) -> None:
    async def resolver(name: str, port: int) -> list[str]:
        raise AssertionError("looked up")

    async def scene() -> None:
        assert await refused(SafeFetcher(resolver=resolver), url) == "address"

    play(scene)


def test_ports_beyond_those_of_the_web_are_refused() -> None:
    async def resolver(name: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    async def scene() -> None:
        for port in (0, 22, 25, 6379, 11211, 65535):
            assert await refused(SafeFetcher(resolver=resolver), f"http://host.test:{port}/") == "address"

    play(scene)


# ---- what a name means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["127.0.0.2", "10.1.2.3", "::1", "::ffff:127.0.0.1", "fe80::1%lo", "nonsense"])
def test_one_bad_address_among_good_ones_is_enough(bad: str) -> None:
    """Otherwise a resolver could put a good one first and let that fail."""

    async def act(site: Site) -> None:
        async def resolver(name: str, port: int) -> list[str]:
            return ["127.0.0.1", bad]

        assert await refused(fetcher(site, resolver=resolver), site.url(host="mixed.test")) == "address"
        assert site.connections == 0

    with_site({"/": PAGE}, act)


def test_rebinding_finds_no_second_look_up() -> None:
    """The name is good once and bad ever after: the page comes from the good one, after a single look-up; what asks anew,
    a second fetch or a redirect, is refused."""

    async def scene() -> None:
        async with Site({"/": PAGE, "/again": redirect("/")}) as good, Site({"/": page("secret")}, "127.0.0.2") as bad:
            answers: list[str] = []

            async def resolver(name: str, port: int) -> list[str]:
                answers.append("127.0.0.1" if not answers else "127.0.0.2")
                return answers[-1:]

            by = fetcher(good, resolver=resolver)
            assert (await by.fetch(good.url(host="rebind.test"))).body == b"<p>krill</p>"
            assert len(answers) == 1
            assert await refused(by, good.url(host="rebind.test")) == "address"
            answers.clear()
            assert await refused(by, good.url("/again", host="rebind.test")) == "address"
            assert len(answers) == 2 and bad.connections == 0

    play(scene)


def test_a_name_keeps_its_host_header_and_the_next_address_is_tried() -> None:
    async def act(site: Site) -> None:
        async def resolver(name: str, port: int) -> list[str]:
            return ["127.0.0.9", "127.0.0.1"]  # nobody listens on the first one

        by = SafeFetcher(resolver=resolver, allowed_for_tests=lambda *_: True)
        found = await by.fetch(site.url("/a?b=c#d", host="pages.test"))
        assert found == Fetched(site.url("/a?b=c#d", host="pages.test"), "text/html", "utf-8", b"<p>krill</p>")
        assert site.asked[0].headers["host"] == f"pages.test:{site.port}" and site.asked[0].target == "/a?b=c"

    with_site({"/a": PAGE}, act)


# ---- redirects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_and_checked_again(status: int) -> None:
    async def scene() -> None:
        async with Site({}) as inside, Site({}, "127.0.0.2") as site:
            inside.answers["/"] = page("secret")
            targets = [
                inside.url(), inside.url(host="localhost"), inside.url(host="inside.test"),
                inside.url(host="[::ffff:127.0.0.1]"),
                inside.url(host="2130706433"), "file:///etc/passwd", "ftp://127.0.0.1/", inside.url(host="user@127.0.0.1"),
                f"//127.0.0.1:{inside.port}/", "http://[", "\\\\127.0.0.1\\", "http://169.254.169.254/latest/meta-data/",
            ]  # fmt: skip
            by = fetcher(site)
            for target in targets:
                site.answers["/go"] = redirect(target, status)
                assert await refused(by, site.url("/go")) == "address", target
            assert inside.connections == 0
            site.answers |= {"/go": redirect("on?x=1", status), "/on": PAGE}
            assert (await by.fetch(site.url("/go"))).url == site.url("/on?x=1")

    play(scene)


def test_circles_end() -> None:
    async def act(site: Site) -> None:
        assert await refused(fetcher(site, limits=Limits(redirects=3)), site.url()) == "redirects"
        assert len(site.asked) == 4

    with_site({"/": redirect("/")}, act)


def test_nothing_of_one_request_is_kept_for_the_next() -> None:
    """No cookies, no credentials, no referrer, whatever the first answer sets."""

    async def act(site: Site) -> None:
        by = fetcher(site)
        await by.fetch(site.url("/go"))
        await by.fetch(site.url("/page"))
        assert len(site.asked) == 3 and site.connections == 3
        for asked in site.asked:
            assert not {"cookie", "authorization", "referer", "origin"} & set(asked.headers)

    go = page("", status=302, Location="/page", Set_Cookie="id=1; Path=/")
    with_site({"/go": go, "/page": page("x", Set_Cookie="id=2; Path=/")}, act)


def test_proxies_and_netrc_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    async def scene() -> None:
        async with Site({"/": PAGE}) as site, Site({}, "127.0.0.2") as proxy:
            for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy"):
                monkeypatch.setenv(name, proxy.url())
            (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password word\n")
            monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
            monkeypatch.setenv("HOME", str(tmp_path))
            assert (await fetcher(site).fetch(site.url())).body
            site.answers["/"] = page("{}", "application/json")
            assert await ServiceClient().json("GET", site.url()) == {}
            assert proxy.connections == 0 and not any("authorization" in a.headers for a in site.asked)

    play(scene)


# ---- TLS ----------------------------------------------------------------------------------------------------------


def test_tls_verifies_the_name_that_was_asked_for() -> None:
    """The connection goes to a checked address, but a certificate must be for the host, and from someone trusted."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("right.test").configure_cert(server)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)

    async def scene() -> None:
        async with Site({"/": PAGE}, tls=server) as site:
            by = fetcher(site, certificates=trusting)
            assert (await by.fetch(site.url(host="right.test"))).body == b"<p>krill</p>"
            assert await refused(by, site.url(host="wrong.test")) == "network"
            assert await refused(by, site.url()) == "network"
            assert await refused(fetcher(site), site.url(host="right.test")) == "network"
            assert len(site.asked) == 1

    play(scene)


# ---- what an answer may cost --------------------------------------------------------------------------------------


def packed(data: bytes, wbits: int) -> bytes:
    squeeze = zlib.compressobj(9, zlib.DEFLATED, wbits)
    return squeeze.compress(data) + squeeze.flush()


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", lambda data: gzip.compress(data[:7]) + gzip.compress(data[7:])),
        ("gzip", lambda data: gzip.compress(data) + b"\0\0\0"),
        ("deflate", zlib.compress),
        ("deflate", lambda data: packed(data, -15)),
        ("identity", lambda data: data),
    ],
)
def test_compressed_pages_are_unpacked(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    text = b"the whale takes in a whole sea " * 3000

    async def act(site: Site) -> None:
        assert (await fetcher(site).fetch(site.url())).body == text
        exact = Limits(max_bytes=len(text))
        assert (await fetcher(site, limits=exact).fetch(site.url())).body == text
        tight = Limits(max_bytes=len(text) - 1)
        assert await refused(fetcher(site, limits=tight), site.url()) == "size"

    with_site({"/": page(pack(text), Content_Encoding=encoding)}, act)


def test_a_bomb_costs_no_more_than_its_cap() -> None:
    """200 MB of zeros in 200 kB: the peak of what Python allocates stays near the cap."""
    import tracemalloc

    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)
    bomb = b"".join(squeeze.compress(bytes(1 << 20)) for _ in range(200)) + squeeze.flush()
    many = gzip.compress(bytes(1 << 20)) * 150

    async def act(site: Site) -> None:
        for path in ("/one", "/many"):
            tracemalloc.start()
            assert await refused(fetcher(site, limits=Limits(max_bytes=1 << 20)), site.url(path)) == "size"
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 12 << 20, path

    with_site({"/one": page(bomb, Content_Encoding="gzip"), "/many": page(many, Content_Encoding="gzip")}, act)


def endless(_: Asked) -> bytes:
    return b"HTTP/1.1 200 X\r\nContent-Type: text/html\r\n\r\n" + b"whale " * 500_000


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (page("x" * 100, Content_Length="99999999999"), "size"),
        (page("x" * 3000), "size"),
        (endless, "size"),
        (page("x", "application/octet-stream"), "type"),
        (page("x", "image/svg+xml"), "type"),
        (page("x", ""), "type"),
        (page("x", "text/html+evil"), "type"),
        (page(gzip.compress(b"whale" * 50)[:-9], Content_Encoding="gzip"), "encoding"),
        (page(b"no gzip", Content_Encoding="gzip"), "encoding"),
        (page(gzip.compress(gzip.compress(b"x")), Content_Encoding="gzip, gzip"), "encoding"),
        (page("x", Content_Encoding="br"), "encoding"),
        (page("x", status=404), "status"),
        (page("x", status=500), "status"),
        (page("", status=204), "status"),
        (page("", status=302), "status"),
        (b"", "network"),
        (b"not http at all\r\n\r\n", "network"),
        (b"HTTP/1.1 200 X\r\n" + b"X-Long: y\r\n" * 40_000 + b"\r\n", "network"),
        (page("x", Content_Length="10"), "network"),
    ],
)  # fmt: skip
def test_answers_that_are_refused(answer: bytes, reason: str) -> None:
    async def act(site: Site) -> None:
        assert await refused(fetcher(site, limits=Limits(max_bytes=2000)), site.url()) == reason

    with_site({"/": answer}, act)


def test_a_server_that_drips_is_left() -> None:
    """Every read brings something, so only the total catches it."""

    async def scene() -> None:
        async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 X\r\nContent-Type: text/html\r\n\r\n")
            while not writer.is_closing():
                writer.write(b"x")
                await asyncio.sleep(0.02)

        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        by = SafeFetcher(Limits(total_s=0.3), allowed_for_tests=lambda *_: True)
        assert await refused(by, url) == "time"
        server.close()

    play(scene)


def test_types_can_be_asked_for() -> None:
    async def act(site: Site) -> None:
        found = await fetcher(site).fetch(site.url(), types=("application/json",))
        assert (found.type, found.charset) == ("application/json", "")

    with_site({"/": page("{}", "Application/JSON")}, act)


# ---- services of the operator -------------------------------------------------------------------------------------


def test_a_service_is_asked_for_json() -> None:
    async def act(site: Site) -> None:
        by = ServiceClient(max_bytes=1000, timeout_s=5)
        assert await by.json("GET", site.url("/ok"), params={"q": "a&b"}, headers={"X-Key": "k"}) == {"a": 1}
        assert await by.json("POST", site.url("/ok"), body={"q": "鲸"}) == {"a": 1}
        get, post = site.asked
        assert (get.method, get.target, get.headers["x-key"]) == ("GET", "/ok?q=a%26b", "k")
        assert (post.method, post.body.decode()) == ("POST", '{"q":"鲸"}')
        for path, says in (("/elsewhere", "302"), ("/long", "more than"), ("/html", "JSON"), ("/down", "503: tired")):
            with pytest.raises(BackendUnavailable, match=says):
                await by.json("GET", site.url(path))
        with pytest.raises(BackendUnavailable, match="cannot be reached"):
            await by.json("GET", "http://127.0.0.1:9/")

    answers = {
        "/ok": page('{"a": 1}', "application/json"),
        "/elsewhere": redirect("/ok"),
        "/long": page("[" + "1," * 1000 + "1]", "application/json"),
        "/html": PAGE,
        "/down": page("tired", status=503),
    }
    with_site(answers, act)
