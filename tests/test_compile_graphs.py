"""compile=graphs: what is compiled how, and that nothing is read from a graph's memory after its next call. On a GPU: tests/gpu."""

import pytest
import torch

import lba_exp
from lba_exp.callbacks.efficiency import compiled_graphs
from lba_exp.errors import ConfigError
from lba_exp.models.pretrained import create
from lba_exp.tasks.classification import Classification
from lba_exp.tasks.language import LanguageModelling
from tests.conftest import SMALL
from tests.corpus import write_corpus
from tests.test_family import LM

GRAPHS = {"dynamic": False, "mode": "reduce-overhead"}
MIXER = {"kind": "linear", "gate": "selective", "form": "chunkwise", "chunk_size": 4}
TINY = {"width": 8, "depth": 1, "heads": 2, "length": 6, "vocabulary": 20, "mixer": MIXER}
compiling = torch.compile


class Recorder:
    """Takes the place of ``torch.compile``: functions run as they are, and what they and their backward passes gave is NaN from the next
    call on, as after the replay of a CUDA graph."""

    def __init__(self):
        self.compiled, self.calls = [], 0
        self.alive = 0  # gradients that were still held as their memory was written to: torch would copy them
        self._given, self._hooks = [], []

    def __call__(self, function, **options):
        self.compiled.append((function, options))

        def run(*arguments, **named):
            self.calls += 1
            assert not torch.is_inference_mode_enabled()  # what is recorded in it cannot be recorded again in training
            for tensor in self._given:
                self.alive += any(tensor is parameter.grad for parameter in function.__self__.parameters())
                tensor.data.fill_(torch.nan)
            for hook in self._hooks:
                hook.remove()
            self._given = given = [function(*arguments, **named)]
            made = [p for p in function.__self__.parameters() if p.grad is None and torch.is_grad_enabled()]
            self._hooks = [p.register_post_accumulate_grad_hook(lambda p: given.append(p.grad)) for p in made]
            return given[0]

        return run


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setattr(torch, "compile", made)
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("data") / "corpus")


def both(overrides):
    """The metrics of a run as it is written, and with CUDA graphs."""
    runs = ([*overrides, "parity=off", "trainer.max_epochs=1", f"compile={flag}", f"folder=run_{flag}"] for flag in ("false", "graphs"))
    return [lba_exp.train(lba_exp.compose(run), quiet=True)["metrics"] for run in runs]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_is_that_of_the_model_as_it_is_written(recorder, accumulate):
    """Dropout, an average of weights, a last batch of another size, validation within the epoch."""
    run = [*SMALL, f"trainer.accumulate_grad_batches={accumulate}", "optim.ema_decay=0.9", "trainer.val_check_interval=2"]
    one, other = both(run)
    assert one == other
    assert [(function.__name__, options) for function, options in recorder.compiled] == [("forward", GRAPHS)]
    assert recorder.calls > 7 and not recorder.alive


def test_of_a_language_model_the_encoder_is_recorded(recorder, corpus):
    one, other = both([*LM, *corpus, "model=lion_s", "trainer.accumulate_grad_batches=2", "trainer.limit_train_batches=5"])
    assert one == other
    [(function, options)] = recorder.compiled
    assert type(function.__self__).__name__ == "TextEncoder" and options == GRAPHS and recorder.calls > 5


def test_logits_may_be_kept(recorder):
    model = create(TINY | {"kind": "sequence_classifier", "classes": 2})
    task = Classification(model, classes=2, optim={})
    task.compile_model(graphs=True)
    batches = [{"inputs": torch.randint(20, (3, 6))} for _ in range(2)]
    kept = [task(batch) for batch in batches]
    assert all(torch.equal(logits, model(**batch)) for logits, batch in zip(kept, batches, strict=True)) and recorder.calls == 2


def test_one_graph_whatever_the_number_of_labels(monkeypatch):
    """And outside of ``logits`` the model is as it was."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, mode, **options: compiling(function, backend="eager", **options))
    model = create(TINY | {"kind": "masked_lm"}).eval()
    task = LanguageModelling(model, classes=20, optim={})
    task.compile_model(graphs=True)
    before, inputs = compiled_graphs(), torch.randint(20, (3, 6))
    for labels in (1, 2, 5):
        batch = {"inputs": inputs, "labels": torch.full((3, 6), -100)}
        batch["labels"][:, :labels] = 7
        logits, targets = task.logits_and_labels(batch)
        assert len(logits) == len(targets) == 3 * labels
        torch.testing.assert_close(logits, model(inputs, selected=batch["labels"] == 7))
    assert compiled_graphs() - before == 1 and not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("kind", ["sequence_classifier", "two_towers"])
def test_batch_norm_and_checkpointing_are_one_graph(kind):
    """The running statistics count a batch once."""
    torch._dynamo.reset()
    model = create(TINY | {"kind": kind, "classes": 2, "norm": "batch", "gradient_checkpointing": True}).train()
    inputs, mask = torch.randint(20, (3, 2, 6)), (torch.arange(6) < torch.tensor([[6], [3], [4]])).unsqueeze(1).expand(3, 2, 6)
    if kind != "two_towers":
        inputs, mask = inputs[:, 0], mask[:, 0]
    state, found = {name: value.clone() for name, value in model.state_dict().items()}, []
    for run in (model.forward, compiling(model.forward, fullgraph=True, backend="aot_eager", dynamic=False)):
        model.load_state_dict(state)
        model.zero_grad()
        logits = run(inputs, mask)
        logits[:, 0].sum().backward()
        found.append([logits, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_language_model_without_encoder_is_named():
    with pytest.raises(ConfigError, match="compile=graphs does not go with Linear, a language model without an encoder"):
        LanguageModelling(torch.nn.Linear(2, 2), classes=2, optim={}).compile_model(graphs=True)


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["compile=graph"], "did you mean graphs[?] Valid: false, true, graphs"),
        (["compile=null"], "compile does not fit: give one of false, true, graphs"),
        (["compile=graphs", "trainer=fsdp"], "compile=graphs does not go with trainer=fsdp"),
        (["compile=graphs", "trainer.strategy=deepspeed"], "give trainer=ddp, or compile=true"),
        (["compile=graphs", "sequence_parallel_size=2"], "does not go with compile=graphs.*compile=false"),
    ],
)
def test_what_does_not_fit_is_one_sentence(overrides, said):
    with pytest.raises(ConfigError, match=said):
        lba_exp.compose(overrides)
