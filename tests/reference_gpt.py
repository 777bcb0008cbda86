"""The model of the recipe written a second time, to hold train_gpt.py against: float64, token by token, head by head.

Nothing of train_gpt.py is used but the network's table with its switches, and the names and layout of the parameters.
Everything is differentiable, so that gradients can be compared too.
"""

import math

import torch


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 2**-23).sqrt()


def sigmoid(x):
    return 1 / (1 + (-x).exp())


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def wrapped(number):
    """A Python integer as 32 bits hold it."""
    return (number + 2**31) % 2**32 - 2**31


def bigram_row(before, token, rows):
    """Row of the bigram table for a token and the one before (None at position 0 and at BOS)."""
    return ngram_row([token, before], rows)


def sign_row(before, token):
    return ngram_sign([token, before])


def ngram_row(gram, rows):
    """Row of a table of its own for an n-gram, its last token first (None before position 0 and BOS)."""
    token, before, *earlier = gram
    if before is None:
        return rows - 1
    hashed = wrapped(36313 * token) ^ wrapped(27191 * before)
    last = before
    for factor, each in zip((48611, 91193, 60013), earlier):
        last = last if each is None else each  # the document's first token stands in for what is before it
        hashed ^= wrapped(factor * last)
    return hashed % (rows - 1)


def ngram_sign(gram):
    token, before, *earlier = gram
    if before is None:
        before, earlier = token, [None] * len(earlier)
    sign, last = token ^ before, before
    for number, each in enumerate(earlier, 1):
        last = last if each is None else each
        sign ^= wrapped(last * 32**number)
    return sign % 8192


def rotated(x, position, frequencies):
    """The vector x (d,) at a position: its first pairs turn, one a frequency; the rest stays."""
    turned = []
    for j, frequency in enumerate(frequencies):
        even, odd = x[2 * j], x[2 * j + 1]
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        turned += [cos * even + sin * odd, cos * odd - sin * even]
    return torch.cat((torch.stack(turned), x[len(turned) :]))


def probabilities(q, k, docs, window, scale, i):
    """The positions that query i sees, causal, in its document and at most `window` back; and how much of each."""
    seen = [j for j in range(i + 1) if docs[j] == docs[i] and i - j <= window]
    weights = (scale * torch.stack([k[j] for j in seen]) @ q[i]).exp()
    return seen, weights / weights.sum()


def attended(q, k, v, docs, window, scale):
    """Attention over lists of vectors, one a position."""
    outputs = []
    for i in range(len(q)):
        seen, weights = probabilities(q, k, docs, window, scale, i)
        outputs.append(weights @ torch.stack([v[j] for j in seen]))
    return outputs


class ReferenceGPT:
    """A model of `config` (a ModelConfig) with the values of `tensors`: parameters and buffers by name."""

    def __init__(self, config, tensors):
        self.config = config
        self.p = {name: tensor.detach().double() for name, tensor in tensors.items()}
        table = range(len(config.layers))
        self.attending = [i for i in table if config.layers[i].attention]
        self.excluding = [i for i in table if config.layers[i].xsa]
        self.valued = [i for i in table if config.layers[i].value_embeds is not None]
        self.mixing = [i for i in table if config.layers[i].mudd is not None and config.mudd]
        self.gated = [i for i in self.valued if i not in self.mixing]
        self.with_gate = [i for i in table if config.layers[i].attention_gate and config.attention_gate]
        self.narrow = [i for i in table if config.layers[i].narrow_qk and config.narrow_qk]
        self.networks = [i for i in table if config.layers[i].gates and config.gates]

    def logits(self, tokens, windows, rotary=None):
        """The capped logits (T, V). `windows` are short and long, `rotary` frequencies and scale (else the start's)."""
        c, p, T = self.config, self.p, len(tokens)
        d = c.dim // c.heads
        self.tokens, self.windows = tokens, windows
        self.frequencies, self.scale = rotary or ([1024 ** (-j / (d // 4 - 1)) for j in range(d // 4)], 0.1)
        self.begins = [t == 0 or tokens[t] == c.bos_id for t in range(T)]
        self.docs = [sum(token == c.bos_id for token in tokens[: t + 1]) for t in range(T)]

        e = [p["embed"][token] for token in tokens]
        x = e
        if c.smear:
            smeared = [e[t] + p["smear_lambda"] * sigmoid(p["smear_gate"] @ e[t][:12]) * e[t - 1] for t in range(T)]
            x = [e[t] if self.begins[t] else smeared[t] for t in range(T)]
        x = cache0 = x0 = norm(torch.stack(x))
        b = self.bigrams()
        caches, self.made, self.columns = [], {}, 0

        for i, layer in enumerate(c.layers):
            if i in self.networks:
                self.make_gates(i, x)
            rho, pi = (list(p[name][i]) for name in ("resid_lambdas", "post_lambdas"))
            source, from_source = x0, self.made.get((i, "x0"), 0.0)
            from_bigram = self.made.get((i, "bigram"), 0.0)
            if not self.networks:
                from_source = p["x0_lambdas"][i]
                from_bigram = p["bigram_lambdas"][i] if c.bigram else 0.0
            if i == 0:  # before the layer, in the place of after its attention
                x = cache0 = x + from_bigram * b
                from_bigram = 0.0
            to_v = self.value_rows(layer)
            if layer.skip is not None and c.skip:
                if self.networks:
                    gate = sigmoid(p["skip_lambda"]) * self.made[i, "skip"]
                else:
                    gate = sigmoid(p["skip_lambda"]) * 2 * sigmoid(x0[:, :12] @ p["skip_gate"])[:, None]
                x = x + gate * caches[layer.skip]
            if i in self.mixing:
                mu = self.coefficients(x, place=0)
                cache7 = caches[layer.mudd[0]]
                gates = torch.cat((mu[6].expand(T, c.heads // 2), mu[7].expand(T, c.heads // 2)), dim=1)
                to_v = self.per_head(gates, to_v) + mu[0] * cache0 + mu[1] * cache7 + mu[2] * x
                x = (1 + mu[5]) * x + mu[3] * cache0 + mu[4] * cache7
                rho, pi = [mu[8], mu[12]], [mu[9], mu[13]]
                source, from_source, from_bigram = cache0, mu[10], mu[11] if c.bigram else 0.0
            if i in self.attending:
                a = norm(x if layer.single_input is None or not c.single_input else caches[layer.single_input])
                if i in self.gated and c.value_embeds:
                    pieces = torch.cat((a[:, :6], to_v[:, :6]), dim=1)
                    to_v = self.per_head(2 * sigmoid(pieces @ p["value_gates"][self.gated.index(i)].T), to_v)
                x = rho[0] * x + pi[0] * self.attention(i, a, to_v) + from_source * source + from_bigram * b
            w_in, w_out = p["mlp_bank"][2 * i], p["mlp_bank"][2 * i + 1]
            x = rho[1] * x + pi[1] * (norm(x) @ w_in.T).clamp(min=0) ** 2 @ w_out
            caches.append(x)

        if self.mixing:
            mu = self.coefficients(x, place=1)
            cache7, cache9, cache3 = (caches[i] for i in c.layers[self.mixing[0]].mudd)
            e0 = self.value_rows(next((c.layers[i] for i in self.valued if c.layers[i].value_embeds == 0), None))
            x = x + mu[0] * cache0 + mu[1] * cache7 + mu[2] * cache9 + mu[3] * e0 + mu[4] * cache3
        return 23 * sigmoid((norm(x) @ p["lm_head"] + 5) / 7.5)

    def make_gates(self, first, x):
        """What the network before layer `first` makes, (T, H) or (T, 1) by layer and name."""
        c, p, number = self.config, self.p, self.networks.index(first)
        outputs = p["gates_scale"] * (gelu(x @ p["gates_w1"][number].T) @ p["gates_w2"].T + p["gates_bias"])
        for i in range(first, len(c.layers)):
            if i > first and i in self.networks:
                break
            layer, wanted = c.layers[i], []
            wanted += [("xsa", c.heads)] * (layer.xsa and c.xsa)
            wanted += [("attention", c.heads)] * (i in self.with_gate)
            wanted += [("x0", 1)] * (layer.attention and i not in self.mixing)
            wanted += [("bigram", 1)] * ((layer.attention or i == 0) and i not in self.mixing and c.bigram)
            wanted += [("skip", 1)] * (layer.skip is not None and c.skip)
            wanted += [("dc_in", c.heads), ("dc_out", c.heads)] * (layer.dc and c.dc)
            for name, width in wanted:
                self.made[i, name] = outputs[:, self.columns : self.columns + width]
                self.columns += width

    def bigrams(self):
        """The bigram embedding times its signs (T, D), zero in the channels that do not receive it."""
        c, rows = self.config, []
        for t, token in enumerate(self.tokens):
            row = torch.zeros(c.dim, dtype=torch.float64)
            if c.bigram:
                gram, place = [token], t
                while len(gram) < c.ngram:
                    place = None if place is None or self.begins[place] else place - 1
                    gram.append(None if place is None else self.tokens[place])
                products = []
                for n, table in enumerate(self.p["bigram_table"].chunk(c.ngram - 1), 2):
                    signs = self.p["bigram_signs"][ngram_sign(gram[:n])]
                    products.append(table[ngram_row(gram[:n], len(table))] * signs)
                product = torch.cat(products)
                row = torch.cat((product, row[len(product) :]))
            rows.append(row)
        return torch.stack(rows)

    def value_rows(self, layer):
        """Each token's row (T, D) of the layer's value embedding; zero where it has none."""
        c = self.config
        if layer is None or layer.value_embeds is None or not c.value_embeds:
            return torch.zeros(len(self.tokens), c.dim, dtype=torch.float64)
        table = self.p["value_embeds"].reshape(-1, len(self.p["embed"]), c.dim)[layer.value_embeds]
        return torch.stack([table[token] for token in self.tokens])

    def per_head(self, gates, rows):
        """rows (T, D), each head's channels times its gate (T, H)."""
        return rows * gates.repeat_interleave(self.config.dim // self.config.heads, dim=1)

    def coefficients(self, x, place):
        """MUDD's coefficients, each (T, 1): 14 before the layer (place 0), 5 after the last one (place 1)."""
        p, part = self.p, slice(0, 14) if place == 0 else slice(14, 19)
        mu = 0.1 * (gelu(x @ p["mudd_w1"][place].T) @ p["mudd_w2"][part].T + p["mudd_bias"][part])
        return [mu[:, [j]] for j in range(mu.shape[1])]

    def attention(self, i, a, to_v):
        """The output (T, D) of layer i's attention for its input a, with `to_v` (T, D) added to the values."""
        c, p, layer, n, T = self.config, self.p, self.config.layers[i], self.attending.index(i), len(a)
        H, d = c.heads, c.dim // c.heads
        window = self.windows[1] if layer.window == "long" else self.windows[0]
        in_scale, out_scale = p["qkv_lambdas"][n], p["out_lambdas"][n]
        scale, narrow = self.scale, i in self.narrow
        if narrow:
            scale = 1.2 * scale
            w_q, w_k = p["narrow_qk_bank"].reshape(len(self.narrow), 2, H, d // 2, c.dim)[self.narrow.index(i)]
        else:
            wide = [j for j in self.attending if j not in self.narrow]
            w_q, w_k = p["qk_bank"].reshape(len(wide), 2, H, d, c.dim)[wide.index(i)]
        w_v, w_o = p["vo_bank"][2 * n].reshape(H, d, c.dim), p["vo_bank"][2 * n + 1]
        pair = layer.paired_heads and c.paired_heads
        parts = {}
        for h in range(H):
            position = [2 * t + h % 2 if pair else t for t in range(T)]
            q = [rotated(norm(in_scale * w_q[h] @ a[t]), position[t], self.frequencies) for t in range(T)]
            k = [rotated(norm(in_scale * w_k[h] @ a[t]), position[t], self.frequencies) for t in range(T)]
            v = [in_scale * w_v[h] @ a[t] + to_v[t, h * d : h * d + d] for t in range(T)]
            if layer.window == "long" and c.key_offset and not narrow:
                k = [k[t] if self.begins[t] else torch.cat((k[t][: d // 2], k[t - 1][d // 2 :])) for t in range(T)]
            parts[h] = q, k, v
        y = {h: attended(*parts[h], self.docs, window, scale) for h in range(H) if not pair}
        for h in range(0, H if pair else 0, 2):
            both = [[x for token in zip(*heads) for x in token] for heads in zip(parts[h], parts[h + 1])]
            z = attended(*both, [doc for doc in self.docs for _ in range(2)], window, scale)
            y[h], y[h + 1] = z[0::2], z[1::2]
        for t in range(T if (i, "dc_in") in self.made else 0):
            own, mixture = self.made[i, "dc_in"][t], 0.0
            for g in range(H):
                seen, weights = probabilities(*parts[g][:2], self.docs, 111, scale, t)
                mixture = mixture + own[g] / (own.square().mean() + 1e-6).sqrt() * weights
            for h in range(H):
                v = torch.stack([parts[h][2][j] for j in seen])
                y[h][t] = y[h][t] + self.made[i, "dc_out"][t, h] * mixture @ v
        for h in range(H):
            for t in range(T):
                v = parts[h][2][t]
                if layer.xsa and c.xsa and v.any():
                    unit = v / v.square().sum().sqrt()
                    if self.networks:
                        alpha = self.made[i, "xsa"][t, h]
                    else:
                        alpha = p["xsa_alphas"][self.excluding.index(i), h]
                    y[h][t] = y[h][t] - alpha.tanh() * (y[h][t] @ unit) * unit
                if i in self.with_gate:
                    if self.networks:
                        gate = self.made[i, "attention"][t, h]
                    else:
                        gate = sigmoid(p["attention_gates"][self.with_gate.index(i), h] @ a[t, :12])
                    y[h][t] = y[h][t] * gate
        return torch.stack([torch.cat([y[h][t] for h in range(H)]) for t in range(T)]) @ (out_scale * w_o).T


def cross_entropy(z, targets):
    """The loss of each token (T,) for capped logits z (T, V)."""
    return torch.stack([row.exp().sum().log() - row[target] for row, target in zip(z, targets)])


def objective(z, targets, weights):
    """The multi-token objective, summed over positions; the normalizer counts all weights, also at the end."""
    total = 0.0
    for i, row in enumerate(z):
        for k, weight in enumerate(weights):
            total = total + weight * row.exp().sum().log()
            if i + k < len(targets):
                total = total - weight * row[targets[i + k]]
    return total
