"""The unlearning trainer: its losses against float64 sums over plain logits, its equivalences, and what is refused."""

import copy
import dataclasses
import math
import re
import traceback

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM

from ceu_rl import UnlearnConfig, UnlearnTrainer
from ceu_rl.models import build_tokenizer
from ceu_rl.unlearn import METHODS, add_unlearning_head, ceu_loss

from .engines import answered
from .test_fused import HostReads
from .trainers import assert_close_gradients, build, gradients_of


def answers(pairs):
    return Dataset.from_list(answered(pairs))


FORGET = answers([(a, b) for a in range(4) for b in range(4)])
RETAIN = answers([(a, b) for a in range(5, 9) for b in range(6)])


@pytest.fixture
def make_trainer(tiny_model, tokenizer, tmp_path):
    def make(loss_type="ceu", *, forget=FORGET, retain=RETAIN, **given):
        default = {"model": tiny_model(1), "processing_class": tokenizer, "loss_type": loss_type}
        default |= {"max_steps": 2, "learning_rate": 1e-3, "max_grad_norm": 1e9}
        rows = {"forget_dataset": forget, "retain_dataset": retain}
        return build(UnlearnTrainer, tmp_path, **rows, **{**default, **given})

    return make


def batches_of(trainer):
    """The batches that it computes a loss of, kept as they come."""
    batches, compute = [], trainer.compute_loss

    def keep(model, inputs, *args, **kwargs):
        batches.append(copy.copy(inputs))
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = keep
    return batches


def answer_positions(logits, labels):
    """Logits (n, V) and labels (n,) of each sequence, one pair for each."""
    shifted = labels[:, 1:]
    return [(row[:-1][kept != -100], kept[kept != -100]) for row, kept in zip(logits, shifted, strict=True)]


def plain_forget_loss(method, logits, ref_logits, labels):
    """The forget term from plain float64 logits, one sequence after the other, with the formulas of the papers."""
    tokens, sequences = [], []
    for (z, y), (z_ref, _) in zip(answer_positions(logits, labels), answer_positions(ref_logits, labels), strict=True):
        p, picked = z.softmax(-1), z.log_softmax(-1).gather(-1, y[:, None])[:, 0]
        p_y = p.gather(-1, y[:, None])[:, 0].detach()
        if method == "ceu":
            q = z.detach().scatter(-1, y[:, None], -math.inf).softmax(-1)
            tokens += list(-(q * z.log_softmax(-1)).sum(-1))
        elif method in ("grad_ascent", "grad_diff"):
            tokens += list(picked)
        elif method == "wga":
            tokens += list(p_y * picked)
        elif method == "satimp":
            tokens += list(p_y**5 * (1 - p_y) * picked)
        elif method == "undial":
            target = (z_ref - 10 * F.one_hot(y, z.shape[-1])).softmax(-1)
            tokens += list(-(target * z.log_softmax(-1)).sum(-1))
        elif method == "tnpo":
            p_ref = z_ref.softmax(-1).gather(-1, y[:, None])[:, 0]
            p_now = z.softmax(-1).gather(-1, y[:, None])[:, 0]
            tokens += list(2 * torch.log(1 + p_now / p_ref))
        elif method == "npo":
            reference = z_ref.log_softmax(-1).gather(-1, y[:, None])[:, 0].sum()
            sequences.append(-2 / 0.1 * torch.log(torch.sigmoid(-0.1 * (picked.sum() - reference))))
        elif method == "simnpo":
            sequences.append(-2 / 4.5 * torch.log(torch.sigmoid(-4.5 * picked.mean())))
    return torch.stack(tokens or sequences).mean()


def plain_retain_loss(kind, logits, ref_logits, labels):
    tokens = []
    for (z, y), (z_ref, _) in zip(answer_positions(logits, labels), answer_positions(ref_logits, labels), strict=True):
        log_p, log_ref = z.log_softmax(-1), z_ref.log_softmax(-1)
        kl = (log_ref.exp() * (log_ref - log_p)).sum(-1)
        tokens += list(-log_p.gather(-1, y[:, None])[:, 0] if kind == "nll" else kl)
    return torch.stack(tokens).mean()


@pytest.mark.parametrize("kind", ["nll", "kl"])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_plain_logits(make_trainer, tiny_model, method, kind):
    # A sharper model than a random one, so that the terms differ from each other
    sharp = tiny_model(1)
    with torch.no_grad():
        sharp.lm_head.weight *= 20
    reference = copy.deepcopy(sharp)
    with torch.no_grad():
        reference.lm_head.weight *= 0.7
    needs = METHODS[method].needs_reference or kind == "kl"
    plain, plain_ref = copy.deepcopy(sharp).double(), copy.deepcopy(reference).double()
    settings = {"retain_loss_type": kind, "forget_weight": 0.25, "retain_weight": 0.5, "max_steps": 1}
    trainer = make_trainer(method, model=sharp, ref_model=reference if needs else None, **settings)
    batches = batches_of(trainer)
    (found,) = gradients_of(trainer)
    (batch,) = batches

    def logits(model, prefix=""):
        return model(batch[f"{prefix}input_ids"], attention_mask=batch[f"{prefix}attention_mask"]).logits

    forget = plain_forget_loss(method, logits(plain), logits(plain_ref).detach(), batch["labels"])
    loss, log = 0.25 * forget, trainer.state.log_history[0]
    given = (logits(plain, "retain_"), logits(plain_ref, "retain_").detach(), batch["retain_labels"])
    retain = plain_retain_loss(kind, *given)
    loss = loss + 0.5 * retain
    loss.backward()
    assert log["retain_loss"] == pytest.approx(retain.item(), rel=1e-4)
    assert log["forget_loss"] == pytest.approx(forget.item(), rel=1e-4)
    assert log["loss"] == pytest.approx(loss.item(), rel=1e-3)
    assert_close_gradients([dict((n, p.grad) for n, p in plain.named_parameters())], [found], rtol=1e-3)


class OurHostReads(HostReads):
    """Those of this package alone: the innermost line that is not torch's is in it."""

    def note(self):
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename]
        inner = next(frame for frame in reversed(frames) if "/tests/" not in frame.filename)
        self.count += "/ceu_rl/" in inner.filename


@pytest.mark.parametrize("method", [*METHODS, "kl"])
def test_a_micro_batch_reads_nothing_on_the_host(make_trainer, monkeypatch, method):
    """But the number of rows that are selected, once for each term that selects them."""
    given = {"loss_type": "npo", "retain_loss_type": "kl"} if method == "kl" else {}
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    trainer = make_trainer(**{"loss_type": method, **given, **settings})
    reads, found = OurHostReads(), []
    monkeypatch.setattr(torch.Tensor, "tolist", reads.to_list(torch.Tensor.tolist))
    step, batches = trainer.training_step, trainer.get_batch_samples

    def watched(work):
        def watch(*args, **kwargs):
            reads.count = 0
            with reads:
                result = work(*args, **kwargs)
            found.append(reads.count)
            return result

        return watch

    trainer.training_step, trainer.get_batch_samples = watched(step), watched(batches)
    trainer.train()
    selecting = method in ("ceu", "undial", "kl")
    assert found == [0, selecting, selecting] * 2


@pytest.mark.parametrize("method", ["undial", "kl"])
def test_two_models_make_logits_of_the_answers_alone(make_trainer, tokenizer, method):
    """Of Gemma too, which caps them."""
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight *= 20
    plain, plain_ref = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    given = {"loss_type": "undial"} if method == "undial" else {"retain_loss_type": "kl"}
    trainer = make_trainer(**given, model=model, max_steps=1)
    sizes = []
    for each in (model, trainer.ref_model):
        each.lm_head.register_forward_hook(lambda module, given, logits: sizes.append(logits.shape))
    batches = batches_of(trainer)
    trainer.train()
    batch, log = batches[0], trainer.state.log_history[0]
    prefix = "" if method == "undial" else "retain_"
    labels = batch[f"{prefix}labels"]
    assert sizes == [(int((labels[:, 1:] != -100).sum()), len(tokenizer))] * 2
    found = [m(batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]).logits for m in (plain, plain_ref)]
    if method == "undial":
        expected = plain_forget_loss("undial", *found, labels)
        assert log["forget_loss"] == pytest.approx(expected.item(), rel=1e-4)
    else:  # as long as the two are the same model
        assert log["retain_loss"] == pytest.approx(0.0, abs=1e-6)


def test_a_copy_unlearns_with_its_own_weights(tiny_model):
    model, plain = tiny_model(0), tiny_model(1)
    for each in (model, plain):
        add_unlearning_head(each)
    other = copy.deepcopy(model)
    other.load_state_dict(plain.state_dict())
    ids = torch.arange(12).view(2, 6)
    found, expected, first = (each(input_ids=ids, inside=ceu_loss, labels=ids) for each in (other, plain, model))
    assert torch.equal(found, expected) and not torch.equal(found, first)


@pytest.mark.parametrize("opens", [True, False])
def test_long_texts_are_cut_into_pieces(make_trainer, tiny_model, opens):
    """Every token after the first is predicted once, and no piece is longer than `max_length`.

    A piece that would be an end token alone is left out.
    """
    tokenizer = build_tokenizer()
    texts = ["".join(chr(97 + i % 26) for i in range(length)) for length in (2, 8, 9, 10, 26)]
    texts = [("<|bos|>" if opens else "") + text for text in texts]
    given = {"retain": None, "processing_class": tokenizer, "ignore_first_n_answer_tokens": 0, "max_length": 9}
    rows = Dataset.from_list([{"text": text} for text in texts])
    with pytest.raises(ValueError, match=r"Row 2 of the forget dataset has \d+ tokens, and max_length \d+ would cut"):
        make_trainer(forget=rows, **{**given, "max_length": 9 + opens})
    pieces = make_trainer(forget=rows, chunk=True, **given).train_dataset
    assert max(map(len, pieces["input_ids"])) == 9
    predicted = []
    for ids, labels in zip(pieces["input_ids"], pieces["labels"], strict=True):
        assert not opens or ids[0] == tokenizer.bos_token_id
        assert labels[1:] == ids[1:]
        predicted += labels[1:]
    predicted = [token for token in predicted if token != tokenizer.eos_token_id]
    assert predicted == [token for text in texts for token in tokenizer(text).input_ids[1:]]
    with pytest.raises(ValueError, match="chunk is True and max_length None"):
        UnlearnConfig("unused", chunk=True, max_length=None, use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="max_length 9 would cut its answer off"):  # an answer is not cut
        make_trainer(chunk=True, max_length=9)


@pytest.mark.parametrize("method", ["ceu", "npo", "undial"])
def test_gradient_accumulation_equals_one_large_batch(make_trainer, method):
    large = make_trainer(method)
    small = make_trainer(method, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_close_gradients(gradients_of(large), gradients_of(small))
    assert small.state.log_history[0]["loss"] == pytest.approx(large.state.log_history[0]["loss"], rel=1e-4)
    batch = next(iter(large.get_train_dataloader()))
    tokens = sum(batch[key].sum().item() for key in ("attention_mask", "retain_attention_mask"))
    assert small.state.log_history[0]["num_tokens"] == large.state.log_history[0]["num_tokens"] == tokens


def test_every_retain_row_is_used_before_one_comes_again(make_trainer):
    trainer = make_trainer()
    pairs = trainer.train_dataset
    seen = []
    for epoch in range(3):
        pairs.epoch = epoch
        seen += [tuple(pairs[index]["retain"]["input_ids"]) for index in range(len(pairs))]
    assert len(set(seen[: len(RETAIN)])) == len(RETAIN) == 24
    assert seen[len(RETAIN) :] == seen[: len(FORGET) * 3 - len(RETAIN)]


@pytest.mark.parametrize("method", ["ceu", "npo"])
def test_lora_trains_the_adapter_and_takes_the_base_as_reference(make_trainer, method):
    trainer = make_trainer(method, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]))
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, start[name])}
    assert moved and all("lora" in name for name in moved)
    assert trainer.ref_model is None
    if method == "npo":  # a new adapter changes nothing, so that policy and reference agree
        assert trainer.state.log_history[0]["forget_loss"] == pytest.approx(20 * math.log(2), rel=1e-5)


def test_only_methods_that_need_one_hold_a_reference(make_trainer):
    held = {method for method in METHODS if make_trainer(method).ref_model is not None}
    assert held == {"npo", "tnpo", "undial"}


def test_a_reference_drops_nothing_out(make_trainer, tiny_model):
    """Of a model that was just trained, and so is in train mode."""
    trainer = make_trainer("npo", model=tiny_model(1, attention_dropout=0.5).train())
    assert not trainer.ref_model.training and trainer.model.training


@pytest.mark.parametrize("loss_type", METHODS)
def test_a_config_made_for_another_method_takes_its_defaults(loss_type):
    other = UnlearnConfig("unused", bf16=False, use_cpu=True)
    own = dataclasses.replace(other, loss_type=loss_type).method
    assert own == METHODS[loss_type] and own.ignore_first_n_answer_tokens == (loss_type == "ceu")


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"loss_type": "ga"}, "loss_type is 'ga'; use one of ceu, grad_ascent"),
            ({"retain_loss_type": "l2"}, "retain_loss_type is 'l2'"),
            ({"loss_type": "npo", "beta": 0.0}, "beta is 0.0; use a number above 0"),
            ({"loss_type": "ceu", "beta": 0.1}, "beta is 0.1, and loss_type 'ceu' has none"),
            ({"retain_weight": float("nan")}, "retain_weight is nan"),
            ({"margin": float("inf")}, "margin is inf"),
            ({"ignore_first_n_answer_tokens": -1}, "ignore_first_n_answer_tokens is -1"),
            ({"packing": True}, "packing is True, which unlearning does not support"),
            ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1"),
        ],
    )
    def test_settings(self, settings, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            UnlearnConfig("unused", **settings)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"forget": FORGET.select([])}, "The forget dataset has no rows"),
            ({"forget": None}, "forget_dataset is a NoneType"),
            ({"retain": RETAIN.select([])}, "The retain dataset has no rows"),
            ({"retain": answers([(5, 5), (1, 2), (3, 0)])}, "2 rows of the forget dataset are in the retain"),
            ({"max_length": 9}, "max_length 9 would cut its answer off"),
            ({"ignore_first_n_answer_tokens": 5}, "has 5 answer tokens and ignore_first_n_answer_tokens is 5"),
            ({"loss_type": "grad_diff", "retain": None}, "'grad_diff' with retain_loss_type 'nll', and retain_dataset"),
            ({"retain_loss_type": "kl", "retain": None}, "retain_loss_type 'kl', and retain_dataset is None"),
            ({"train_dataset": FORGET}, "train_dataset is given"),
        ],
    )
    def test_data(self, make_trainer, given, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_trainer(**given)

    def test_a_template_that_swallows_the_answer(self, make_trainer):
        tokenizer = build_tokenizer()
        asked = "{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}"
        tokenizer.chat_template = f"{{% for message in messages %}}{asked}{{% endfor %}}"
        with pytest.raises(ValueError, match="Row 0 of the forget dataset has no answer left after tokenization"):
            make_trainer(processing_class=tokenizer)

    def test_a_reference_that_is_the_model_or_is_not_needed(self, make_trainer, tiny_model):
        model = tiny_model()
        with pytest.raises(ValueError, match="ref_model is the model itself"):
            make_trainer("npo", model=model, ref_model=model)
        with pytest.raises(ValueError, match="ref_model is given, and neither loss_type 'ceu'"):
            make_trainer(ref_model=tiny_model(2))

    def test_a_mixture_of_experts_with_its_loss(self, make_trainer, mixture):
        with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0\.001, which unlearning does not support"):
            make_trainer(model=mixture())

    @pytest.mark.parametrize("method", ["ceu", "npo", "undial"])
    def test_a_model_whose_logits_are_nan(self, make_trainer, tiny_model, method):
        model = tiny_model()
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
        trainer = make_trainer(method, model=model)
        with pytest.raises(FloatingPointError, match=r"Step 1 met a non-finite loss .*nan.*no earlier checkpoint"):
            trainer.train()
