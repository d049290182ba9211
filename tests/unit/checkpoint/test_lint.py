"""`rorqual lint`: every rule fires on a checkpoint broken that way and on no sound one, --fix mends what it says it
mends, and what lint calls loadable for rorqual is loaded by rorqual."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from typer.testing import CliRunner, Result

from rorqual.checkpoint import load_model, save_model
from rorqual.checkpoint.lint import ENGINES, FIXED, RULES, check, fix, lint, with_config, write_config
from rorqual.checkpoint.lint_subject import SEVERITIES, expected, open_subject
from rorqual.checkpoint.names import released_tensors
from rorqual.cli.lint import lint as command
from rorqual.config import ModelConfig, resolve_model
from rorqual.errors import RorqualError
from tests.broken import BASES, BREAKERS, COMPANIONS, SOUND, broken, sound, table
from tests.parity import build, draw, twin

ROOT = Path(__file__).resolve().parents[3]
BUNDLED = resolve_model()
BY_ID = {rule.id: rule for rule in RULES}
# What is true of the small models here, and wrong for nobody else.
OWN = {"tokenizer-own-vocabulary"}
# A sound base that some engine cannot use: what is said of it, and nothing more.
TRUE_OF_BASE = {
    "mtp": {"mtp-depth"}, "mtp-two": {"mtp-depth", "mtp-several"}, "mtp-null": {"mtp-depth", "mtp-q-lora-null"},
    "tied": {"tied-without-head"}, "dense": {"no-moe-layers"}, "many-experts": {"group-too-large"},
    "narrow-latent": {"latent-width"}, "odd-heads": {"head-dim-padding"}, "fp8": {"fp8-ragged"},
    "fp8-narrow": {"fp8-ragged", "fp8-widths"}, "int4-embedding": {"embedding-packed"}, "int4-head": {"head-packed"},
    "int4-odd": {"experts-mixed"},
    "int4-tied": {"embedding-packed", "embedding-packed-tied", "tied-without-head"},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lint")


@pytest.fixture(scope="module")
def directories(folder: Path) -> dict[str, Path]:
    return broken(folder)


def run(*words: object) -> Result:
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100", "TERM": "dumb"})


# ---- the rules ----------------------------------------------------------------------------------------------------


def test_every_rule_has_a_broken_checkpoint_and_a_name_of_its_own() -> None:
    assert set(BREAKERS) == set(BY_ID) and len(BY_ID) == len(RULES)
    for rule in RULES:
        assert rule.severity in SEVERITIES and rule.engines and set(rule.engines) <= set(ENGINES)
        assert rule.id == rule.id.lower() and " " not in rule.id and rule.wrong and rule.fix


@pytest.mark.parametrize("base", BASES)
def test_a_sound_checkpoint_has_only_what_is_true_of_it(folder: Path, base: str) -> None:
    assert set(lint(sound(folder, base)).ids) == TRUE_OF_BASE.get(base, set()) | OWN


@pytest.mark.parametrize("rule", BREAKERS)
def test_the_rule_fires_and_no_other(directories: dict[str, Path], rule: str) -> None:
    found = set(lint(directories[rule]).ids)
    assert rule in found
    allowed = {rule, *COMPANIONS.get(rule, {}), *TRUE_OF_BASE.get(BREAKERS[rule][0], set()), *OWN}
    assert found <= allowed, found - allowed
    assert set(COMPANIONS.get(rule, {})) <= found


def test_findings_name_numbers_and_are_sorted(directories: dict[str, Path]) -> None:
    [finding] = [f for f in lint(directories["experts-missing"]).findings if f.severity == "error"]
    assert finding.found == "1 of n_routed_experts 8 absent: layer 1 expert 5"
    for directory in directories.values():
        order = [SEVERITIES.index(f.severity) for f in lint(directory).findings]
        assert order == sorted(order)


@pytest.mark.parametrize("seed", range(12))
def test_what_we_save_is_without_error(tmp_path: Path, seed: int) -> None:
    """Drawn configurations: what fires is true of the drawn config, each by a condition of its own."""
    cfg = draw(seed).replace(num_nextn_predict_layers=seed % 3)
    model = build(cfg, seed)
    save_model(model, tmp_path / "model")
    true_of_it = {"tokenizer-missing", "latent-width"}
    yarn = cfg.rope_scaling
    conditions = {
        "yarn-mscale-missing": yarn is not None and "mscale" not in yarn,
        "positions-beyond-yarn": yarn is not None,
        "mtp-depth": cfg.num_nextn_predict_layers > 0,
        "mtp-several": cfg.num_nextn_predict_layers > 1,
        "mtp-q-lora-null": cfg.num_nextn_predict_layers > 0 and cfg.q_lora_rank is None,
        "tied-without-head": cfg.tie_word_embeddings,
    }
    true_of_it |= {rule for rule, holds in conditions.items() if holds}
    report = lint(tmp_path / "model")
    assert {f.id for f in report.findings if f.severity != "note"} == true_of_it
    wanted = {name: tuple(view.shape) for name, view in released_tensors(model)}
    assert dict(expected(open_subject(tmp_path / "model").size(), cfg.tie_word_embeddings)) == wanted


def test_the_bundled_model_is_right() -> None:
    """No error, and only warnings of engines that cannot use what it is."""
    report = lint(BUNDLED)
    assert report.count("error") == 0
    assert {f.id for f in report.findings if f.severity == "warning"} <= {
        "latent-width", "mtp-depth", "mtp-q-lora-null", "tied-without-head", "embedding-packed", "embedding-packed-tied",
        "rms-norm-eps", "pre-tokenizer",
    }  # fmt: skip
    assert not any("rorqual" in f.engines for f in report.findings)


def test_what_is_right_for_rorqual_is_loaded_by_rorqual(directories: dict[str, Path]) -> None:
    """Lint against the loader: no error for rorqual means that it loads, and gives finite numbers."""
    stub = {"demo-naming"}  # holds one tensor
    for rule, directory in directories.items():
        if rule in stub or any(f.severity == "error" for f in lint(directory).for_engine("rorqual").findings):
            continue
        with torch.no_grad():
            logits = load_model(directory, dtype="float32")(torch.arange(3, 20)[None])
        assert bool(torch.isfinite(logits).all()), rule


def test_what_rorqual_refuses_is_an_error_for_it(directories: dict[str, Path]) -> None:
    for rule, directory in directories.items():
        try:
            load_model(directory, dtype="float32")
        except RorqualError:
            affected = [f for f in lint(directory).for_engine("rorqual").findings if f.severity == "error"]
            assert affected or rule == "demo-naming", rule


# ---- hostile and odd directories ----------------------------------------------------------------------------------


def values() -> Iterator[Any]:
    yield from (None, True, -1, 0, 1.5, "x", [], {}, [1], {"a": 1}, float("nan"), 10**12)


@pytest.mark.parametrize(
    "key", sorted({*ModelConfig.__dataclass_fields__, "rope_parameters", "architectures", "auto_map"})
)
def test_no_value_of_a_key_is_a_crash(folder: Path, key: str) -> None:
    """Whatever stands in config.json is a finding, and --fix survives it."""
    subject = open_subject(sound(folder, "fp8"))
    for value in values():
        fix(check(with_config(subject, {**subject.raw, key: value})))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '"x"', '{"model": 3, "added_tokens": [1, {}]}', "[" * 9999])
def test_no_file_is_a_crash(tmp_path: Path, folder: Path, file: str, text: str) -> None:
    for path in sound(folder, "sound").iterdir():
        (tmp_path / path.name).hardlink_to(path)
    (tmp_path / file).unlink()
    (tmp_path / file).write_text(text)
    lint(tmp_path)


def test_an_empty_directory_is_findings_and_none_is_an_error(tmp_path: Path) -> None:
    assert lint(tmp_path).ids == ["config-missing", "weights-missing"]
    with pytest.raises(RorqualError, match="no model directory"):
        lint(tmp_path / "nowhere")


# ---- --fix --------------------------------------------------------------------------------------------------------

# A repair that cannot know the answer in this case: the fix text says so.
UNKNOWABLE = {"config-defaults", "head-missing"}


@pytest.mark.parametrize("rule", [rule.id for rule in RULES if rule.repair is not None])
def test_fix_mends_what_it_says_it_mends(directories: dict[str, Path], rule: str) -> None:
    before = lint(directories[rule])
    config, mended, after = fix(before)
    if rule in UNKNOWABLE:
        assert rule in after.ids and rule not in mended
        return
    assert rule in mended and rule not in after.ids
    assert set(after.ids) <= set(before.ids) | {"tied-without-head"}, "a repair brought a fault of its own"
    kept = set(before.subject.raw) - {"auto_map", "quantization_config"}
    assert kept <= set(config)
    assert lint_of(directories[rule], config) == after.ids


def lint_of(directory: Path, config: dict[str, Any]) -> list[str]:
    """As if the mended file stood in place of config.json."""
    return check(with_config(open_subject(directory), json.loads(json.dumps(config)))).ids


def test_fix_after_what_transformers_drops_is_the_sound_config_again(folder: Path) -> None:
    subject = open_subject(sound(folder, "sound"))
    dropped = ("scoring_func", "topk_method", "moe_layer_freq", "rope_scaling", "rope_theta")
    raw = {k: v for k, v in subject.raw.items() if k not in dropped} | {"num_nextn_predict_layers": 1, "own_key": [1]}
    config, mended, after = fix(check(with_config(subject, raw)))
    assert config == {**subject.raw, "own_key": [1]}
    assert set(after.ids) == OWN and len(mended) == 5


def test_what_transformers_saves_is_found_and_mended(tmp_path: Path) -> None:
    """The real thing: `save_pretrained` of the installed transformers, and our loader on the mended copy."""
    model = build(draw(0).replace(rope_scaling=SOUND.rope_scaling, max_position_embeddings=2560), 0)
    saved = tmp_path / "saved"
    peer = twin(model, tmp_path / "ours")
    # Keys of ours that its class does not know it would keep; a configuration of its own has none of them.
    own = {f.name: getattr(peer.config, f.name) for f in dataclasses.fields(type(peer.config))}
    again = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**own))
    again.load_state_dict(peer.state_dict())
    again.save_pretrained(saved)
    config, mended, after = fix(lint(saved))
    wanted = {"scoring-func-missing", "topk-method-missing", "moe-layer-freq-missing", "rope-parameters-only"}
    assert wanted <= set(mended) and after.count("error") == 0
    write_config(config, saved / "config.json")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(saved)(tokens), model(tokens))


def test_a_head_that_was_lost_is_not_tied_away(folder: Path, directories: dict[str, Path]) -> None:
    subject = lint(directories["head-missing"]).subject
    unsaid = with_config(subject, {k: v for k, v in subject.raw.items() if k != "tie_word_embeddings"})
    config, mended, _ = fix(check(unsaid))
    assert config["tie_word_embeddings"] is True and mended == ["head-missing"]


def test_an_absent_q_lora_rank_is_read_from_the_weights(folder: Path) -> None:
    for base, rank in (("sound", 128), ("mtp-null", None)):
        subject = open_subject(sound(folder, base))
        config, _, after = fix(
            check(with_config(subject, {k: v for k, v in subject.raw.items() if k != "q_lora_rank"}))
        )
        assert config["q_lora_rank"] == rank and "config-defaults" not in after.ids


def test_of_two_stretches_the_one_that_fits_the_context_wins(folder: Path) -> None:
    subject = open_subject(sound(folder, "sound"))
    wrong = {**subject.raw["rope_scaling"], "factor": 8}
    config, mended, _ = fix(check(with_config(subject, {**subject.raw, "rope_scaling": wrong})))
    assert "rope-contradiction" in mended and config["rope_scaling"] == subject.raw["rope_scaling"]


# ---- the command --------------------------------------------------------------------------------------------------


def test_exit_status_and_last_line(directories: dict[str, Path], folder: Path) -> None:
    good = run(sound(folder, "sound"))
    assert good.exit_code == 0
    assert "0 errors, 0 warnings, 1 note (" in good.stdout.splitlines()[-1]
    bad = run(directories["groups-all-kept"])
    assert bad.exit_code == 1 and "topk_group = n_group = 2" in bad.stdout
    assert "1 error, 0 warnings, 1 note (" in bad.stdout.splitlines()[-1]


def test_engine_counts_only_what_affects_it(directories: dict[str, Path]) -> None:
    assert run(directories["groups-all-kept"], "--engine", "vllm").exit_code == 0
    result = run(directories["groups-all-kept"], "--engine", "llama.cpp")
    assert result.exit_code == 1 and "groups-all-kept" in result.stdout
    unknown = run(directories["groups-all-kept"], "--engine", "tgi")
    assert isinstance(unknown.exception, RorqualError) and "engines: transformers" in str(unknown.exception)


def test_json_is_one_object(directories: dict[str, Path]) -> None:
    for rule, directory in directories.items():
        result = run(directory, "--json")
        facts = json.loads(result.stdout)
        assert rule in [f["id"] for f in facts["findings"]]
        assert result.exit_code == bool(facts["counts"]["errors"])
        assert sum(facts["counts"].values()) == len(facts["findings"])
        for finding in facts["findings"]:
            assert set(finding) == {"id", "severity", "engines", "found", "wrong", "fix", "repairable"}


def test_fix_writes_beside_and_overwrites_nothing(directories: dict[str, Path], tmp_path: Path) -> None:
    directory = directories["scoring-func-missing"]
    original = (directory / "config.json").read_bytes()
    result = run(directory, "--fix")
    assert f"mended in {directory / FIXED}: scoring-func-missing" in result.stdout
    assert (directory / "config.json").read_bytes() == original
    assert json.loads((directory / FIXED).read_text())["scoring_func"] == "sigmoid"
    target = tmp_path / "new.json"
    facts = json.loads(run(directory, "--fix-to", target, "--json").stdout)
    assert facts["fix"]["mended"] == ["scoring-func-missing"] and target.is_file()
    again = run(directory, "--fix-to", target)
    assert isinstance(again.exception, RorqualError) and "exists" in str(again.exception)
    assert not list(directory.glob(".*writing"))


def test_fix_without_anything_to_mend_writes_nothing(folder: Path) -> None:
    directory = sound(folder, "sound")
    assert "nothing that a change of config.json could mend" in run(directory, "--fix").stdout
    assert not (directory / FIXED).exists()


def test_the_page_of_rules_is_fresh() -> None:
    page = (ROOT / "docs" / "lint.md").read_text(encoding="utf-8")
    assert table() in page, "run python -m tests.broken --write docs/lint.md"
