"""Keys, request ids, the page's files, and what the server needs to run."""

from __future__ import annotations

import gzip
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import openai
import pytest

from rorqual.data.template import ChatTemplate
from rorqual.data.tokenizer import Tokenizer
from rorqual.engine.scripted import ScriptedEngine
from rorqual.errors import ConfigError, RorqualError
from rorqual.serve.app import GenerationDefaults, ServedModel, Settings, create_app
from rorqual.serve.run import is_loopback, listen, serve
from tests.net.harness import Gate, Harness, eventually, running

HI = [{"role": "user", "content": "hi"}]


def test_keys(tokenizer: Tokenizer) -> None:
    with running(tokenizer, Settings(api_keys=("first-key", "second-key"))) as server:
        server.script("opened")
        for key in ("first-key", "second-key"):
            reply = server.client(api_key=key).chat.completions.create(model="tiny", messages=HI)
            assert reply.choices[0].message.content == "opened"
        for key in ("first-ke", "first-key-", "First-key", "second-key first-key", "ключ"):
            response = httpx.get(f"{server.url}/models", headers={"authorization": f"Bearer {key}".encode()})
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key" and key not in response.text
        with pytest.raises(openai.AuthenticationError):
            server.client(api_key="wrong").chat.completions.create(model="tiny", messages=HI, stream=True)


def test_everything_but_probes_and_page_is_behind_the_key(tokenizer: Tokenizer, tmp_path: Path) -> None:
    built_page(tmp_path)
    with running(tokenizer, Settings(api_keys=("k",), page_dir=tmp_path)) as server:
        for path in ("/", "/index.html", "/assets/app-1a2b.js", "/health", "/ready", "/v1/health", "/beta/v1/ready"):
            assert httpx.get(server.url + path).status_code == 200, path
        closed = ["/models", "/v1/models/tiny", "/nothing", "/openapi.json", "//health", "/health/", "/v1/../health/x"]
        for path in closed:
            assert httpx.get(server.url + path).status_code == 401, path
        for path in ("/", "/health", "/chat/completions", "/nothing"):
            assert httpx.post(server.url + path, content=b"{").status_code == 401, path
        for scheme in ("", "k", "Basic k", "Bearer", "Bearer\tk"):
            response = httpx.get(f"{server.url}/models", headers={"authorization": scheme})
            assert response.status_code == 401, scheme
        assert httpx.get(f"{server.url}/models", headers={"authorization": "bearer k"}).status_code == 200


def test_request_ids(server: Harness) -> None:
    def sent(value: str | bytes | None) -> str:
        headers = {} if value is None else {"x-request-id": value}
        return httpx.get(f"{server.url}/health", headers=headers).headers["x-request-id"]

    assert sent("trace-1:a.b_c") == "trace-1:a.b_c"
    own = [sent(None), sent("a b"), sent("x" * 129), sent("{}"), sent("é".encode())]
    assert all(re.fullmatch(r"req_[0-9a-f]{32}", i) for i in own) and len(set(own)) == len(own)
    server.script("x")
    raw = server.client().chat.completions.with_raw_response.create(model="tiny", messages=HI, stream=True)
    assert raw.headers["x-request-id"] and int(raw.headers["openai-processing-ms"]) >= 0
    assert len(list(raw.parse())) > 1


def built_page(directory: Path) -> None:
    (directory / "assets").mkdir()
    (directory / "index.html").write_text("<!doctype html><title>the page</title>")
    (directory / "assets" / "app-1a2b.js").write_text("export {}")


def test_page_is_cached_and_confined(tokenizer: Tokenizer, tmp_path: Path) -> None:
    built_page(tmp_path)
    with running(tokenizer, Settings(page_dir=tmp_path)) as server:
        index, asset = httpx.get(f"{server.url}/"), httpx.get(f"{server.url}/assets/app-1a2b.js")
        assert "the page" in index.text and index.headers["cache-control"] == "no-cache"
        assert "immutable" in asset.headers["cache-control"]
        assert asset.headers["content-type"].startswith("text/javascript")
        for response in (index, asset):
            policy = response.headers["content-security-policy"]
            assert "default-src 'self'" in policy and "unsafe" not in policy and "http" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
        again = httpx.get(f"{server.url}/", headers={"if-none-match": index.headers["etag"]})
        assert again.status_code == 304 and not again.content
        head = httpx.head(f"{server.url}/")
        assert head.status_code == 200 and not head.content and head.headers["etag"] == index.headers["etag"]
        assert httpx.get(f"{server.url}/assets/other.js").status_code == 404


def test_the_frames_have_no_origin_and_no_network(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Their scripts run, so the server takes everything else from them, even where they are opened by themselves."""
    built_page(tmp_path)
    for name in ("preview.html", "diagram.html"):
        (tmp_path / name).write_text("<!doctype html><script>1</script>")
    with running(tokenizer, Settings(page_dir=tmp_path)) as server:
        for name in ("preview.html", "diagram.html"):
            parts = httpx.get(f"{server.url}/{name}").headers["content-security-policy"].split("; ")
            assert {"sandbox allow-scripts", "default-src 'none'", "frame-ancestors 'self'"} <= set(parts)
            assert not any(part.startswith(("connect-src", "frame-src", "child-src", "worker-src")) for part in parts)


def test_large_files_are_sent_gzipped_to_who_takes_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    built_page(tmp_path)
    whole = b"export const a = 1;" * 100
    (tmp_path / "assets" / "big.js").write_bytes(whole)
    (tmp_path / "assets" / "big.js.gz").write_bytes(gzip.compress(whole))
    with running(tokenizer, Settings(page_dir=tmp_path)) as server:
        url = f"{server.url}/assets/big.js"
        small = httpx.get(url, headers={"accept-encoding": "gzip, br"})
        plain = httpx.get(url, headers={"accept-encoding": "identity"})
        assert small.content == plain.content == whole
        assert small.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
        assert small.headers["vary"] == plain.headers["vary"] == "accept-encoding"
        assert int(small.headers["content-length"]) < len(whole) and small.headers["etag"] != plain.headers["etag"]
        again = httpx.get(url, headers={"accept-encoding": "gzip", "if-none-match": small.headers["etag"]})
        assert again.status_code == 304
        assert httpx.get(f"{url}.gz").status_code == 404


def test_without_a_built_page_the_server_says_how_to_build_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with running(tokenizer, Settings(page_dir=tmp_path / "none")) as server:
        assert "npm run build" in httpx.get(f"{server.url}/").text


def test_importing_the_server_loads_no_torch() -> None:
    code = "import sys, rorqual.serve.app, rorqual.serve.run; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]


def app_of(tokenizer: Tokenizer, engine: ScriptedEngine, **settings: object) -> object:
    served = ServedModel(engine, tokenizer, ChatTemplate("v3"), name="tiny", created=0)
    return create_app({"tiny": served}, Settings(**settings))


def test_an_open_host_needs_a_key(tokenizer: Tokenizer) -> None:
    for host in ("0.0.0.0", "::", "192.168.0.1", "example.org"):
        assert not is_loopback(host)
        with pytest.raises(ConfigError, match="key"):
            listen(app_of(tokenizer, ScriptedEngine()), host, 0)
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"))
    listen(app_of(tokenizer, ScriptedEngine(), api_keys=("k",)), "0.0.0.0", 0).close()


def test_a_port_in_use_is_told_in_one_sentence(tokenizer: Tokenizer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} on 127.0.0.1 is in use.*--port"):
            serve(app_of(tokenizer, ScriptedEngine()), port=port)
    for port in (-1, 70000):
        with pytest.raises(ConfigError):
            serve(app_of(tokenizer, ScriptedEngine()), port=port)


class Broken(ScriptedEngine):
    async def start(self) -> None:
        raise RorqualError("the weights are missing")


def test_an_engine_that_cannot_start_says_why(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RorqualError, match="the weights are missing"):
        serve(app_of(tokenizer, Broken()), port=0)
    assert not caplog.records, "the error is raised, not logged as well"


def test_shutdown_ends_streams_with_an_error_and_stops_the_engine(tokenizer: Tokenizer, gate: Gate) -> None:
    with running(tokenizer, Settings(heartbeat_s=0.1), grace_s=1) as server:
        server.script("never", gate=gate.wait)
        stream = server.client().chat.completions.create(model="tiny", messages=HI, stream=True)
        failure: list[Exception] = []

        def wait() -> None:
            with pytest.raises(openai.APIError) as caught:
                server.client().chat.completions.create(model="tiny", messages=HI)
            failure.append(caught.value)

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert eventually(lambda: len(server.engine.live) == 2)
        server.server.should_exit = True
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        waiting.join(10)
        assert isinstance(failure[0], openai.InternalServerError) and "shutting down" in str(failure[0])
    assert not server.engine.alive and len(server.engine.aborted) == 2


@pytest.mark.parametrize(("stop", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_signals_stop_the_server_and_its_engine(tokenizer: Tokenizer, tmp_path: Path, stop: int, status: int) -> None:
    tokenizer.save(tmp_path)
    code = f"""if True:
        import sys
        from rorqual.data.template import ChatTemplate
        from rorqual.data.tokenizer import Tokenizer
        from rorqual.engine.scripted import ScriptedEngine
        from rorqual.serve.app import ServedModel, Settings, create_app
        from rorqual.serve.run import serve

        class Engine(ScriptedEngine):
            async def stop(self):
                await super().stop()
                print("engine stopped", flush=True)

        tokenizer = Tokenizer.load({str(tmp_path)!r})
        served = ServedModel(Engine(), tokenizer, ChatTemplate("v3"), name="tiny", created=0)
        serve(create_app({{"tiny": served}}, Settings()), port=0, on_ready=lambda url: print(url, flush=True))
        """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    url = process.stdout.readline().strip()
    with httpx.Client() as idle:  # an idle connection that is kept open must not hold the server up
        assert idle.get(f"{url}/ready").status_code == 200
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (status, "engine stopped\n", "")


def test_short_answers_survive_a_shutdown(tokenizer: Tokenizer) -> None:
    with running(tokenizer, grace_s=5) as server:
        server.script("ten words or so that take a moment", delay_s=0.02)
        stream = server.client().chat.completions.create(model="tiny", messages=HI, stream=True)
        server.server.should_exit = True
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "ten words or so that take a moment"


def test_generation_defaults_come_from_the_models_directory(tmp_path: Path) -> None:
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults()
    file = tmp_path / "generation_config.json"
    file.write_text('{"do_sample": true, "temperature": 0.6, "top_p": 0.95, "bos_token_id": 0, "max_new_tokens": 9}')
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(0.6, 0.95, 0, 9)
    file.write_text('{"min_p": 0.05, "repetition_penalty": 1.1}')
    assert GenerationDefaults.load(tmp_path) == GenerationDefaults(min_p=0.05, repetition_penalty=1.1)
    file.write_text('{"do_sample": false}')
    assert GenerationDefaults.load(tmp_path).temperature == 0
    for bad in ("{", "[]", '{"temperature": "warm"}'):
        file.write_text(bad)
        with pytest.raises(ConfigError, match="generation_config"):
            GenerationDefaults.load(tmp_path)


def test_settings_that_cannot_be_meant() -> None:
    for wrong in ({"api_keys": "key"}, {"api_keys": (" ",)}, {"heartbeat_s": 0}, {"max_body_bytes": -1}):
        with pytest.raises(ConfigError):
            Settings(**wrong)
    with pytest.raises(ConfigError):
        create_app({}, Settings())
