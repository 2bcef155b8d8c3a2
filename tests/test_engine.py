"""Schedule, groups, checkpoints and options."""

import contextlib
import json
import math
import os
import random
import signal
import sys
import time
from argparse import Namespace

import pytest
import torch

import cli
import engine
from deepmim import BadInput, Config, DeepMIM

TINY = Config(8, 2, 3, 16, 2, 2, 8, 1, 2, (1, 2))


# ------------------------------------------------------------------------------------- schedule


def test_learning_rate_is_a_line_then_half_a_cosine():
    rates = [engine.learning_rate(step, 100, 10, 2.0, 0.5) for step in range(101)]
    assert rates[:11] == pytest.approx([0.2 * step for step in range(11)])
    assert rates[55] == pytest.approx(1.25)
    assert rates[100] == pytest.approx(0.5)
    for step in range(10, 101):
        assert rates[step] == pytest.approx(0.5 + 1.5 * (math.cos((step - 10) / 90 * math.pi) + 1) / 2)


@pytest.mark.parametrize("lr, expected", [(None, 1.5e-4 * 4), (3e-3, 3e-3)])
def test_peak_rate(lr, expected):
    assert engine.peak_rate(Namespace(lr=lr, blr=1.5e-4, batch_size=1024)) == pytest.approx(expected)


@pytest.mark.parametrize("warmup_epochs, peak_at", [(None, 20), (5, 50), (0, 0)])
def test_warmup_is_a_tenth_unless_given(warmup_epochs, peak_at):
    options = Namespace(lr=1.0, blr=None, min_lr=0.0, epochs=20, warmup_epochs=warmup_epochs)
    rates = [engine.rate_at(step, 10, options) for step in range(200)]
    assert rates.index(max(rates)) == peak_at and max(rates) == 1.0


def test_only_matrices_decay_and_fixed_positions_are_not_trained():
    model = DeepMIM(TINY)
    decay, plain = engine.make_optimizer(model, Namespace(weight_decay=0.1, beta2=0.95)).param_groups
    assert decay["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, rest = ({names[id(p)] for p in group["params"]} for group in (decay, plain))
    assert decayed == {n for n in names.values() if n.endswith("weight") and "norm" not in n}
    assert rest == {n for n in names.values() if n.endswith(("bias", "token")) or "norm" in n}


# ---------------------------------------------------------------------------------- checkpoints


def test_our_model_comes_back(tmp_path):
    torch.save({"config": vars(TINY), "model": DeepMIM(TINY).state_dict()}, tmp_path / "model.pt")
    config, state = engine.load_model(tmp_path / "model.pt")
    assert config == TINY
    engine.load_weights(DeepMIM(config), state, "model.pt")


def mae_checkpoint(config):
    """A model's weights under the names of MAE's code, as its `mae_vit_*` classes save them."""
    state = {}
    for name, value in DeepMIM(config).state_dict().items():
        name = name.removeprefix("encoder.")
        if name.startswith("decoders.0."):
            name = name.removeprefix("decoders.0.")
            name = name if name == "mask_token" else "decoder_" + name
        state[name] = value
    return state


def test_an_mae_checkpoint_becomes_a_model(tmp_path):
    config = Config(8, 2, 3, 768, 2, 12, 512, 2, 16, (2,), norm_pix=False)
    state = mae_checkpoint(config)
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.attn.qkv.weight", "norm.bias", "mask_token",
            "decoder_pos_embed", "decoder_embed.weight", "decoder_blocks.1.mlp.fc2.bias", "decoder_norm.weight",
            "decoder_pred.bias"} <= set(state)
    torch.save({"model": state, "epoch": 3, "args": Namespace(blr=1e-3)}, tmp_path / "mae.pth")  # as MAE's training saves it
    found, ours = engine.load_model(tmp_path / "mae.pth", norm_pix=False)
    assert found == config
    model = DeepMIM(found)
    engine.load_weights(model, ours, "mae.pth")
    assert torch.equal(model.decoders[0].blocks[1].mlp.fc2.weight, state["decoder_blocks.1.mlp.fc2.weight"])


def test_an_mae_of_unknown_width_is_refused(tmp_path):
    torch.save({"model": mae_checkpoint(Config(8, 2, 3, 64, 2, 1, 32, 1, 1, (2,)))}, tmp_path / "mae.pth")
    with pytest.raises(BadInput, match="mae.pth: .* heads can't be known"):
        engine.load_model(tmp_path / "mae.pth")


@pytest.mark.parametrize("dim, depth, patch, heads", [(768, 12, 16, 12), (1024, 24, 16, 16), (1280, 32, 14, 16)])
def test_sizes_of_the_published_mae_models(dim, depth, patch, heads):
    with torch.device("meta"):
        state = mae_checkpoint(Config(224, patch, 3, dim, depth, heads, 512, 8, 16, (depth,)))
    found = engine.sizes_of(state, None, "mae.pth")
    assert (found.image_size, found.patch_size, found.dim, found.depth, found.heads) == (224, patch, dim, depth, heads)


def encoder_file(path, **changes):
    """A checkpoint of an encoder alone, with the names of MAE's code and of timm."""
    state = DeepMIM(Config(8, 2, 3, 16, 2, 2, 8, 1, 2, (2,))).encoder.state_dict()
    torch.save({"model": {**state, **changes}}, path)
    return path


def test_an_encoder_alone_is_no_teacher(tmp_path):
    with pytest.raises(BadInput, match="say --heads"):  # 16 is the width of no published model
        engine.load_encoder(encoder_file(tmp_path / "encoder.pth"))
    config, state = engine.load_encoder(tmp_path / "encoder.pth", heads=4)
    assert (config.image_size, config.patch_size, config.dim, config.depth, config.heads) == (8, 2, 16, 2, 4)
    assert set(state) == set(DeepMIM(TINY).encoder.state_dict())
    state = {name: torch.zeros(1, 5, 192) if name == "pos_embed" else value for name, value in state.items()}
    torch.save({"model": {**state, "patch_embed.proj.weight": torch.zeros(192, 3, 2, 2)}}, tmp_path / "wide.pth")
    with pytest.raises(BadInput, match="an encoder only"):
        engine.load_model(tmp_path / "wide.pth")


@pytest.mark.parametrize("changes, words", [
    (dict(pos_embed=torch.zeros(1, 16, 16)), "and of a class token and a square of patches"),
    (dict(pos_embed=torch.zeros(16)), "a class token and a square"),
    ({"patch_embed.proj.weight": torch.zeros(16, 12)}, "a class token and a square"),
])
def test_an_encoder_of_another_kind_is_refused(tmp_path, changes, words):
    with pytest.raises(BadInput, match=words):
        engine.load_encoder(encoder_file(tmp_path / "encoder.pth", **changes), heads=2)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("make", [
    lambda path: None,
    lambda path: path.mkdir(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_text("not a checkpoint"),
    lambda path: torch.save({"config": vars(TINY), "model": Trap(path.parent / "ran")}, path),
    lambda path: torch.save([1, 2], path),
    lambda path: torch.save({"model": {"a": 1}}, path),
    lambda path: torch.save({"model": {"a": torch.ones(1)}}, path),
    lambda path: torch.save({"config": {"depht": 3}, "model": {}}, path),
    lambda path: torch.save({"config": {"depth": 0}, "model": {}}, path),
    lambda path: torch.save({"model": {**DeepMIM(TINY).encoder.state_dict(), 1: torch.ones(1)}}, path),
    lambda path: torch.save({"model": {**DeepMIM(TINY).encoder.state_dict(), "pos_embed": torch.ones(1, 0, 16)}}, path),
], ids=["missing", "directory", "empty", "text", "code", "list", "no tensors", "other", "other config", "bad config", "no names", "no positions"])
def test_bad_checkpoints_are_refused_and_run_nothing(tmp_path, make):
    make(tmp_path / "model.pt")
    with pytest.raises(BadInput, match="model.pt"):
        engine.load_model(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"config": vars(TINY), "model": DeepMIM(TINY).state_dict()}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadInput, match="not a checkpoint"):
        engine.load_model(path)


@pytest.mark.filterwarnings("ignore")  # torch warns of what the damage looks like
@pytest.mark.parametrize("where", ["header", "anywhere"])
def test_a_damaged_byte_is_harmless_or_refused(tmp_path, where):
    """In the header one wrong byte makes torch.load fail in many ways; in the weights it makes them wrong, and torch.load doesn't notice."""
    path = tmp_path / "model.pt"
    model = DeepMIM(TINY).state_dict()
    torch.save({"config": vars(TINY), "model": model}, path)
    whole, draws, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        content = bytearray(whole)
        content[draws.randrange(60, 9000) if where == "header" else draws.randrange(len(whole))] ^= draws.randrange(1, 256)
        path.write_bytes(content)
        try:
            _, state = engine.load_model(path)
            assert all(torch.equal(model[name], value) for name, value in state.items())
        except BadInput as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("spoil, words", [
    (lambda state: state.pop("encoder.norm.bias"), "encoder.norm.bias is missing"),
    (lambda state: state.update({"encoder.norm.bias": torch.zeros(3)}), "norm.bias is \\(3,\\)"),
    (lambda state: state["decoders.0.pred.bias"].fill_(float("nan")), "pred.bias holds NaN"),
])
def test_weights_that_do_not_fit_are_refused(spoil, words):
    state = DeepMIM(TINY).state_dict()
    spoil(state)
    with pytest.raises(BadInput, match=words):
        engine.load_weights(DeepMIM(TINY), state, "model.pt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    engine.write(path, lambda file: file.write(b"old"))

    def disk_full(file):
        file.write(b"ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(engine.RunFailed, match="No space left"):
        engine.write(path, disk_full)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------- runs on disk


def small_run(path, rank=0):
    """A run of a linear layer in path: (Run, model, optimiser, gradient scaler), where it stopped if it was begun before."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", enabled=False)
    run = engine.Run(Namespace(out=path, resume=True, lr=0.1), engine.Machine(torch.device("cpu"), rank, 2, torch.float32))
    run.restore(model, optimizer, scaler)
    run.open()
    return run, model, optimizer, scaler


def two_epochs(path):
    """Do what is left of two epochs in path; the weights that model.pt then holds."""
    run, model, optimizer, scaler = small_run(path)
    for epoch in range(run.epoch, 2):
        optimizer.zero_grad()
        model(torch.tensor([1.0, 2.0, epoch])).square().sum().backward()
        optimizer.step()
        content = {"model": model.state_dict()}
        run.finish_epoch({"epoch": epoch + 1, "seconds": 1.5}, model, optimizer, scaler, content, result=epoch == 1)
    return torch.load(path / "model.pt", weights_only=True)["model"]


def assert_whole(path, found, expected):
    """The run in path has the expected weights, each epoch once in its log, and its result."""
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 1, "seconds": 1.5}, {"epoch": 2, "seconds": 1.5}]
    assert json.loads((path / "result.json").read_text()) == {"epoch": 2, "seconds": 3.0, "options": {"lr": 0.1}}


def test_a_run_cut_before_any_write_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    write, done = engine.write, []

    def cut(*given, **named):
        if len(done) == last:
            raise KeyboardInterrupt
        done.append(1)
        write(*given, **named)

    monkeypatch.setattr(engine, "write", cut)
    last = None
    expected = two_epochs(tmp_path / "whole")
    assert_whole(tmp_path / "whole", expected, expected)
    total = len(done)
    assert total == 7  # three files an epoch, and the result
    for stop in range(total):
        done.clear()
        last = stop
        with pytest.raises(KeyboardInterrupt):
            two_epochs(tmp_path / str(stop))
        last = None
        assert_whole(tmp_path / str(stop), two_epochs(tmp_path / str(stop)), expected)


def test_a_run_goes_on_from_the_epoch_before_where_last_is_damaged(tmp_path):
    expected = two_epochs(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"")
    assert small_run(tmp_path)[0].epoch == 1
    assert_whole(tmp_path, two_epochs(tmp_path), expected)


@pytest.mark.parametrize("place", ["bias", "loss"])
def test_what_is_no_number_is_not_saved(tmp_path, place):
    run, model, optimizer, scaler = small_run(tmp_path)
    if place == "bias":
        model.bias.data[0] = math.nan
    record = {"epoch": 1, "loss": math.inf if place == "loss" else 1.0, "seconds": 1.5}
    with pytest.raises(engine.RunFailed, match=place):
        run.finish_epoch(record, model, optimizer, scaler, {})
    assert not [path for path in tmp_path.iterdir() if path.name != "lock"]


def test_one_process_of_several_writes(tmp_path):
    for rank, written in ((1, False), (0, True)):
        run, *parts = small_run(tmp_path, rank)
        run.finish_epoch({"epoch": 1, "seconds": 1.5}, *parts, {})
        assert run.epoch == 1 and (tmp_path / "last.pt").exists() == written


# -------------------------------------------------------------------------------- how a script ends


@pytest.mark.parametrize("text, line", [
    ("CUDA out of memory. Tried to allocate 2.00 GiB.", "the memory is too small; --accumulate"),
    ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.", "the memory is too small"),
    ("[third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer", "another process has ended"),
    ("NCCL communicator was aborted on rank 1.", "another process has ended"),
    ("DataLoader worker (pid 7) is killed by signal: Killed.", "a process that decodes images has ended"),
])
def test_known_failures_are_one_line(capsys, text, line):
    def main():
        raise RuntimeError(text)

    with pytest.raises(SystemExit) as end:
        engine.run(main)
    err = capsys.readouterr().err
    assert end.value.code == 1 and line in err and err.count("\n") == 1


def test_a_signal_is_the_reason_whatever_it_broke(capsys):
    """As when it reaches a decoding process too, whose death torch reports while the signal is dealt with."""
    def main():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except KeyboardInterrupt:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")

    with pytest.raises(SystemExit) as end:
        engine.run(main)
    assert end.value.code == 143 and "stopped" in capsys.readouterr().err


class Dying:
    """Something into whose destructor a signal falls."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


AT_FORK = []
os.register_at_fork(before=lambda: AT_FORK and AT_FORK.pop()())  # can't be taken back, so it does nothing but once, on request


def fork_under_a_signal():
    AT_FORK.append(lambda: os.kill(os.getpid(), signal.SIGTERM))
    if os.fork() == 0:
        os._exit(0)


@pytest.mark.parametrize("action", [Dying, fork_under_a_signal])
def test_a_signal_that_python_drops_is_heard_all_the_same(capsys, action):
    """As at the end or the start of the processes that decode images."""
    def main():
        action()
        for _ in range(500):
            time.sleep(0.01)

    with pytest.raises(SystemExit) as end:
        engine.run(main)
    assert end.value.code == 143
    err = capsys.readouterr().err
    assert "stopped" in err and err.count("\n") == 1


def test_what_is_dropped_else_keeps_its_traceback(capsys):
    class Wrong:
        def __del__(self):
            raise ValueError("in a destructor")

    with pytest.raises(SystemExit) as end:
        engine.run(Wrong)
    assert end.value.code == 0 and "ValueError: in a destructor" in capsys.readouterr().err


def test_a_decoding_process_leaves_ctrl_c_to_its_parent():
    def main():
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGINT)
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0

    with pytest.raises(SystemExit) as end:
        engine.run(main)
    assert end.value.code == 0


def test_a_bug_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        engine.run(main)


# -------------------------------------------------------------------------------------- options


def parse(monkeypatch, *arguments):
    parser = cli.Parser("A test.")
    cli.add_model_options(parser)
    cli.add_common_options(parser)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    return parser.parse({"small": {"dim": 16, "heads": 2, "epochs": 3}}, "small")


def test_options_go_over_presets_over_defaults(monkeypatch):
    options = parse(monkeypatch, "--heads", "4", "--taps", "3,12", "--alphas", "1/4", "--no-norm-pix")
    assert (options.dim, options.heads, options.epochs, options.depth) == (16, 4, 3, 12)
    config = cli.config_from(options)
    assert config.taps == (3, 12) and config.alphas == (0.25,) and config.norm_pix is False


@pytest.mark.parametrize("preset, arguments, expected", [
    ({"lr": 1e-3}, [], 1e-3), ({"lr": 1e-3}, ["--blr", "8e-3"], 2e-3), ({"lr": 1e-3}, ["--lr", "2"], 2.0),
    ({"lr": 1e-3}, ["--blr=8e-3"], 2e-3), ({"blr": 1e-4}, [], 1e-4 / 4), ({"blr": 1e-4}, ["--lr", "2"], 2.0),
])
def test_a_given_rate_goes_over_the_presets(monkeypatch, preset, arguments, expected):
    parser = cli.Parser("A test.")
    cli.add_common_options(parser)
    monkeypatch.setattr(sys, "argv", ["train.py", "--batch-size", "64", *arguments])
    assert engine.peak_rate(parser.parse({"small": preset}, "small")) == pytest.approx(expected)


@pytest.mark.parametrize("arguments, words", [
    (["--alphas", "0,1/0,1"], "--alphas"), (["--alphas", "a"], "--alphas"), (["--alphas", "1e400,0,0"], "--alphas"), (["--seed", str(2**64)], "--seed"), (["--taps", "6,x"], "--taps"),
    (["--epochs", "0"], "--epochs"), (["--epochs", "-1"], "--epochs"), (["--lr", "nan"], "--lr"), (["--lr", "inf"], "--lr"),
    (["--lr", "0"], "--lr"), (["--beta2", "1"], "--beta2: 1 must be above zero and below 1"), (["--workers", "-1"], "--workers"), (["--batch-size", "2.5"], "--batch-size"),
    (["--preset", "huge"], "--preset"), (["--device", "tpu"], "--device"), (["--epoch", "3"], "--epoch"),
    (["--lr", "1", "--blr", "1"], "--blr"), (["--depth", "6"], "--taps: .* from 1 to 6"), (["--mask-ratio", "1"], "--mask-ratio"),
])
def test_bad_options_are_named(monkeypatch, arguments, words):
    with pytest.raises(BadInput, match=words):
        cli.config_from(parse(monkeypatch, *arguments))


# ---------------------------------------------------------------------------- precision, machines


def test_losses_are_looked_at_after_each_step_where_a_look_is_free():
    def looks(device):
        machine = engine.Machine(torch.device(device), 0, 1, torch.float32)
        return [step + 1 for step in range(25) if machine.looks(step, 25)]

    assert looks("cpu") == list(range(1, 26)) and looks("cuda") == [10, 20, 25]


def test_bfloat16_is_for_hardware_that_computes_in_it(monkeypatch):
    for abilities, expected in (({"avx512_bf16": True}, torch.bfloat16), ({"avx2": True}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
        assert engine.mixed_precision(torch.device("cpu")) == expected
    for supported, expected in ((True, torch.bfloat16), (False, torch.float16)):  # an A100 and a T4
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        assert engine.mixed_precision(torch.device("cuda")) == expected


def test_json_is_written_as_json(tmp_path):
    engine.write_json(tmp_path / "a.json", {"a": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1, 2]}


# ----------------------------------------------------------------------------- checkpointed activations


def test_checkpointed_activations_keep_less_and_change_no_gradient():
    images, noise = torch.randn(4, 3, 8, 8), torch.rand(4, 16)
    gradients, kept = [], []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = DeepMIM(TINY)
        names = list(model.state_dict())
        if checkpointed:
            engine.checkpoint_activations(model)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
            loss = model(images, noise).loss
        loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        kept.append(sum(sizes.values()))
        assert list(model.state_dict()) == names
    assert all(map(torch.equal, *gradients))
    assert kept[1] < kept[0] / 2
