from pathlib import Path

import pytest

from hybridvit import compose, config


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_overrides_are_laid_over_files_over_defaults(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "train: {epochs: 5, batch_size: 32}\nseed: 1\n")
    write(tmp_path, "b.yaml", "optim: {lr: 0.5}\ntrain: {epochs: 6}\n")
    top = write(tmp_path, "c.yaml", "extends: [a.yaml, b.yaml]\nseed: 2\n")
    loaded = config.load(top, ["train.batch_size=64"])
    assert (loaded.train.epochs, loaded.train.batch_size) == (6, 64)
    assert (loaded.optim.lr, loaded.seed, loaded.optim.momentum) == (0.5, 2, 0.9)


def test_another_part_does_not_inherit_arguments(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "stem: {name: linear, args: {patch: 4}}\n")
    top = write(tmp_path, "b.yaml", "extends: [a.yaml]\nstem: {name: resnet}\n")
    assert config.load(top).stem.args == {}
    assert config.load(
        tmp_path / "a.yaml", ["stem.name=resnet", "stem.args.width=0.5"]
    ).stem.args == {"width": 0.5}
    assert config.load(tmp_path / "a.yaml", ["stem.name=linear"]).stem.args == {"patch": 4}
    assert config.load(tmp_path / "a.yaml", ["stem.args.patch=2"]).stem.args == {"patch": 2}


def test_switching_twice_in_a_chain_keeps_only_the_last_arguments(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "stem: {name: linear, args: {patch: 4}}\n")
    write(tmp_path, "b.yaml", "extends: [a.yaml]\nstem: {name: resnet, args: {width: 0.5}}\n")
    top = write(
        tmp_path, "c.yaml", "extends: [b.yaml]\nstem: {name: linear, args: {bias: false}}\n"
    )
    assert config.load(top).stem.args == {"bias": False}


def test_only_hybridvit_variables_are_read_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRIDVIT_DATA", "/somewhere")
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    good = write(tmp_path, "a.yaml", "data: {args: {root: '${oc.env:HYBRIDVIT_DATA}'}}\n")
    assert config.load(good).data.args["root"] == "/somewhere"
    chosen = "${oc.env:HYBRIDVIT_NONE,${oc.env:HYBRIDVIT_DATA}}/${data.name}"
    good = write(tmp_path, "a.yaml", f"data: {{name: digits, args: {{root: '{chosen}'}}}}\n")
    assert config.load(good).data.args["root"] == "/somewhere/digits"
    for text in (
        "${oc.env:HYBRIDVIT_NONE,${oc.env:SECRET_TOKEN}}",
        "${oc.env:SECRET_TOKEN}",
        "${ oc.env : SECRET_TOKEN}",
        "${\\toc.env:SECRET_TOKEN}",
        "${oc.env\\t:SECRET_TOKEN}",
        "${${data.name}:SECRET_TOKEN}",
        "${oc.env:${data.name}}",
        "${oc.env:HYBRIDVIT_${data.name}}",
        "${oc.decode:x}",
    ):
        content = f'data: {{name: oc.env, args: {{root: "{text}"}}}}\n'
        with pytest.raises(ValueError, match="is not allowed"):
            config.load(write(tmp_path, "b.yaml", content))
    with pytest.raises(ValueError, match="is not allowed"):
        config.load(good, ["data.args.root=${oc.env:SECRET_TOKEN}"])


@pytest.mark.parametrize(
    "text", ["stem: ${nothing}", "stem: {name: '${nothing}'}", "seed: ${seed}"]
)
def test_a_reference_to_nothing_is_said(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"^config: (stem|stem\.name|seed)='\$\{"):
        config.load(write(tmp_path, "a.yaml", text))


def test_references_that_double_line_by_line_are_refused_at_once(tmp_path: Path) -> None:
    """Also where a part's name, which is asked for while files are joined, is one."""
    lines = [f"x{i}: ${{x{i + 1}}}${{x{i + 1}}}" for i in range(30)]
    name = "stem: {name: '${x0}'}"
    with pytest.raises(ValueError, match="61 references"):
        config.load(write(tmp_path, "bomb.yaml", "\n".join([name, *lines, "x30: a"])))
    # Also in files that hold a few each.
    for part in range(8):
        write(tmp_path, f"part{part}.yaml", "\n".join(lines[4 * part : 4 * part + 4]))
    files = ", ".join(f"part{part}.yaml" for part in range(8))
    with pytest.raises(ValueError, match="16 references"):
        config.load(write(tmp_path, "bomb.yaml", f"extends: [{files}]\n{name}\nx30: a"))


def test_many_values_may_be_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a study with many arms."""
    monkeypatch.setenv("HYBRIDVIT_RUNS", "/runs")
    lines = [f"  a{n}: ${{oc.env:HYBRIDVIT_RUNS}}/{n}" for n in range(99)]
    content = compose.read_yaml(write(tmp_path, "study.yaml", "\n".join(["axes:", *lines])))
    assert compose.to_plain(compose.OmegaConf.create(content))["axes"]["a98"] == "/runs/98"


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(ValueError, match="aliases"):
        config.load(write(tmp_path, "bomb.yaml", "\n".join(lines)))


def test_tags_run_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for tag in ("!!python/object/apply:pathlib.Path.touch", "!!python/object/apply:pathlib.Path"):
        with pytest.raises(ValueError, match="tags"):
            config.load(write(tmp_path, "tag.yaml", f"seed: {tag} [{marker}]"))
    assert not marker.exists()
    with pytest.raises(ValueError, match="tags"):
        config.load(write(tmp_path, "tag.yaml", "seed: !!str 1"))


def test_a_config_of_ones_own_extends_a_shipped_one(tmp_path: Path) -> None:
    mine = write(tmp_path, "mine.yaml", "extends: [digits.yaml]\nseed: 7\n")
    loaded = config.load(mine)
    assert (loaded.seed, loaded.stem) == (7, config.load("digits.yaml").stem)


def test_shipped_configs_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose.find("digits.yaml").is_file()
    assert compose.find("configs/digits.yaml").is_file()
    with pytest.raises(ValueError, match=r"did you mean 'digits.yaml'\?"):
        compose.find("digit.yaml")
