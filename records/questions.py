"""Questions to a model under check: losses that must not change when tokens do, and probabilities that sum to 1.

A model is anything with a `config` and `evaluate(inputs, targets, context)`, inputs and targets (T,), which gives the
losses (T,) in nats. What asks yields a finding, in words, for each answer that must not be.
"""

import torch

EXACT = 1e-5  # nats; nothing but rounding may lie between two losses that must be the same


class Problem(Exception):
    """Why a script cannot be checked, or a run did not end as it should.

    What it says is an answer, as `findings` are, and not a mistake of who asks: it goes to stdout.
    """


def evaluate(model, inputs, targets, context):
    losses = model.evaluate(inputs, targets, context)
    if losses.shape != inputs.shape:
        raise Problem(f"evaluate gives losses {tuple(losses.shape)} for tokens {tuple(inputs.shape)}")
    return losses


def another(tokens, config):
    """Other tokens in place of all of these; one may be BOS, or no longer be."""
    return (tokens + 1) % (config.bos_id + 1)


def difference(before, after) -> tuple[int, float] | None:
    """Where losses first differ that must not, and by how much. NaN differs from all."""
    wrong = (~((before - after).abs() <= EXACT)).nonzero()
    return (t := wrong[0].item(), (after - before)[t].item()) if len(wrong) else None


def unlike_itself(model, inputs, targets, context):
    """Evaluates the same tokens twice, and yields where their losses differ."""
    found = difference(*(evaluate(model, inputs, targets, context) for _ in range(2)))
    if found:
        yield (
            f"the same tokens, evaluated twice: the loss of position {found[0]} changes by {found[1]:.2g}; "
            "something is kept from call to call, or drawn"
        )


def leaks_from_later(model, inputs, targets, context, alone=(), with_rest=()):
    """Changes tokens, by themselves or with all that follow, and yields what earlier losses notice."""
    before = evaluate(model, inputs, targets, context)
    changes = [(t, t + 1, "token") for t in alone] + [(t, len(inputs), "all tokens from") for t in with_rest]
    for t, end, what in changes:
        others, other_targets = inputs.clone(), targets.clone()
        others[t:end] = another(inputs[t:end], model.config)
        other_targets[t:] = another(targets[t:], model.config)
        after = evaluate(model, others, other_targets, context)
        found = difference(before[:t], after[:t])
        if found:
            yield f"changing {what} {t} changes the loss of position {found[0]} by {found[1]:.2g}"


def leaks_between_documents(model, inputs, targets, context, numbers, chosen):
    """Changes whole documents but for their BOS, and yields what the losses of others notice."""
    before = evaluate(model, inputs, targets, context)
    for number in chosen:
        own = (numbers == number) & (inputs != model.config.bos_id)
        elsewhere = numbers != number
        for new in another(inputs[own], model.config), model.config.bos_id:  # other words; no words
            others = inputs.clone()
            others[own] = new
            after = evaluate(model, others, targets, context)
            found = difference(before[elsewhere], after[elsewhere])
            if found:
                t = elsewhere.nonzero()[found[0]].item()
                yield (
                    f"changing document {number} changes the loss of position {t}, in document {numbers[t]}, "
                    f"by {found[1]:.2g}"
                )
                break


def false_sum(model, context, length: int):
    """Yields by how much the probabilities over a large vocabulary, of which it tries a sample, sum to more than 1.

    For that the model has weights so small that all tokens are about equally likely.
    """
    for p in model.parameters():
        p.data *= 1e-3
    vocab = model.config.vocab_size
    inputs = torch.full((length,), model.config.bos_id)  # documents without words: all positions are alike
    targets = torch.randperm(vocab, generator=torch.Generator().manual_seed(0))[:length]
    total = vocab * (-evaluate(model, inputs, targets, context).double()).exp().mean().item()
    if not total <= 1 + 1e-3:
        yield f"the probabilities over a vocabulary of {vocab:,} tokens sum to {total:.4g}"


def false_probabilities(model, inputs, targets, context):
    """Yields positions whose probabilities over the vocabulary sum to more than 1, or depend on other targets.

    Less than 1 is legal: a script may give some probability to the padding of the vocabulary.
    """
    vocab = model.config.vocab_size
    positions = torch.arange(len(inputs))
    losses = []
    for shift in range(vocab):  # every position gets every target, and no two neighbours the same
        losses.append(evaluate(model, inputs, (targets + shift + 7 * positions) % vocab, context).double())
    losses = torch.stack(losses)
    for t, probability in enumerate((-losses).exp().sum(0).tolist()):
        if not probability <= 1 + 1e-4:
            yield f"the probabilities of position {t} sum to {probability:.6g}"
            return
    # Half of the targets are the likeliest ones, then the least likely: the other half's losses must not notice.
    likeliest, least = ((targets + choice + 7 * positions) % vocab for choice in (losses.argmin(0), losses.argmax(0)))
    half = torch.rand(len(inputs), generator=torch.Generator().manual_seed(1)) < 0.5
    one, other = (evaluate(model, inputs, torch.where(half, each, targets), context) for each in (likeliest, least))
    found = difference(one[~half], other[~half])
    if found:
        t = (~half).nonzero()[found[0]].item()
        yield f"changing the targets of other positions changes the loss of position {t} by {found[1]:.2g}"


def shake(model) -> None:
    """Random weights: at their start gates and factors are zero, and would hide what passes through them."""
    for _, p in sorted(model.named_parameters()):  # by name: the same weights for every order of the parameters
        p.data += torch.randn_like(p) / min(p.shape[-2:]) ** 0.5
