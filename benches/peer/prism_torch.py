"""The PRISM network in plain PyTorch, to measure against and to check the check.

Written from the architecture's description, with the released checkpoints' tensor names.
Straightforward on purpose: padded windows, concatenated skips, no exact-algebra shortcuts, so that
it does the work that the released network does.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

BASE = {
    "channels": (32, 32, 64, 128, 384), "dim": 768, "depth": 12, "heads": 12, "mlp": 3072, "window": 14, "global": (2, 5, 8, 11), "taps": (3, 6, 9),
    "prompt_mlp": 2048, "score_hidden": 256, "refine": 32,
}
SMALL = {
    "channels": (16, 16, 32, 64, 192), "dim": 192, "depth": 4, "heads": 6, "mlp": 384, "window": 4, "global": (0, 1, 2, 3), "taps": (2, 3, 4),
    "prompt_mlp": 384, "score_hidden": 128, "refine": 16,
}


def shapes(size, config=BASE):
    """Every tensor by name, with its shape, for a patch of `size` voxels."""
    channels, dim, hidden, refine = config["channels"], config["dim"], config["score_hidden"], config["refine"]
    grid, width, out = size // 16, channels[4], {}

    def wb(name, *shape, bias=None):
        out[name + ".weight"] = shape
        out[name + ".bias"] = (bias or shape[0],)

    def conv_pair(at, i, o):
        for n, c in ((0, i), (1, o)):
            wb(f"{at}.conv_{n}.conv", o, c, 3, 3, 3)
            wb(f"{at}.conv_{n}.adn.N", o)

    def attention(at, inner):
        for p in "qkv":
            wb(f"{at}.{p}_proj", inner, width)
        wb(f"{at}.out_proj", width, inner)

    e = "image_encoder"
    wb(f"{e}.patch_embed.proj", dim, 1, 16, 16, 16)
    out[f"{e}.pos_embed"] = (1, grid, grid, grid, dim)
    for b in range(config["depth"]):
        edge = grid if b in config["global"] else config["window"]
        wb(f"{e}.blocks.{b}.norm1", dim)
        wb(f"{e}.blocks.{b}.attn.qkv", 3 * dim, dim)
        for axis in "dhw":
            out[f"{e}.blocks.{b}.attn.rel_pos_{axis}"] = (2 * edge - 1, dim // config["heads"])
        wb(f"{e}.blocks.{b}.attn.proj", dim, dim)
        wb(f"{e}.blocks.{b}.norm2", dim)
        wb(f"{e}.blocks.{b}.mlp.lin1", config["mlp"], dim)
        wb(f"{e}.blocks.{b}.mlp.lin2", dim, config["mlp"])
    out[f"{e}.neck.0.weight"] = (width, dim, 1, 1, 1)
    wb(f"{e}.neck.1", width)
    out[f"{e}.neck.3.weight"] = (width, width, 3, 3, 3)
    wb(f"{e}.neck.4", width)
    for n in range(3):
        path = (dim,) + tuple(channels[level] for level in range(3, n, -1))
        for m, (i, o) in enumerate(zip(path, path[1:])):
            at = f"{e}.neck_list.{n}.up.{m}.single_up"
            out[f"{at}.0.weight"] = (o, i, 3, 3, 3)
            wb(f"{at}.1", o)
            wb(f"{at}.3", o, o, 2, 2, 2)
            wb(f"{at}.4", o)
    conv_pair(f"{e}.cnn_encoder.conv_0", 1, channels[0])
    for level in range(1, 5):
        conv_pair(f"{e}.cnn_encoder.down_{level}.convs", channels[level - 1], channels[level])

    p = "prompt_encoder"
    out[f"{p}.pe_layer.positional_encoding_gaussian_matrix"] = (3, width // 3)
    for name, rows in (
        ("point_embeddings.0", 1), ("point_embeddings.1", 1), ("point_embeddings.2", 1), ("point_embeddings.3", 1),
        ("not_a_point_embed", 1), ("iou_token", 1), ("mask_tokens", 4),
    ):
        out[f"{p}.{name}.weight"] = (rows, width)
    for i, shape in ((0, (4, 1, 2, 2, 2)), (1, (4,)), (3, (16, 4, 2, 2, 2)), (4, (16,)), (6, (width, 16, 1, 1, 1))):
        wb(f"{p}.mask_downscaling.{i}", *shape)
    for layer in range(2):
        at = f"{p}.transformer.layers.{layer}"
        attention(f"{at}.self_attn", width)
        attention(f"{at}.cross_attn_token_to_image", width // 2)
        attention(f"{at}.cross_attn_image_to_token", width // 2)
        wb(f"{at}.mlp.lin1", config["prompt_mlp"], width)
        wb(f"{at}.mlp.lin2", width, config["prompt_mlp"])
        for n in range(1, 5):
            wb(f"{at}.norm{n}", width)
    attention(f"{p}.transformer.final_attn_token_to_image", width // 2)
    wb(f"{p}.transformer.norm_final_attn", width)

    d = "mask_decoder"
    for level in range(4, 0, -1):
        x, o = channels[level], channels[level - 1]
        up = x if level == 1 else x // 2
        wb(f"{d}.decoder.upcat_{level}.upsample.deconv", x, up, 2, 2, 2, bias=up)
        conv_pair(f"{d}.decoder.upcat_{level}.convs", o + up, o)
    for j in range(4):
        for i, o in enumerate((width, width, channels[0])):
            wb(f"{d}.output_hypernetworks_mlps.{j}.layers.{i}", o, width)
    for i, (o, c) in enumerate(((hidden, width), (hidden, hidden), (4, hidden))):
        wb(f"{d}.iou_prediction_head.layers.{i}", o, c)
    wb(f"{d}.refine.first_conv", refine, 4, 1, 1, 1)
    conv_pair(f"{d}.refine.conv1", refine, refine)
    conv_pair(f"{d}.refine.conv2", refine, refine)
    wb(f"{d}.refine.conv_error_map", 1, refine, 1, 1, 1)
    wb(f"{d}.refine.conv_correction", 1, refine, 1, 1, 1)
    return out


def hashed(salt, name, shape):
    """Weights as a function of a salt and a name (FNV-1a seeds splitmix64)."""
    h = 0xCBF29CE484222325
    for byte in f"{salt}/{name}".encode():
        h = (h ^ byte) * 0x100000001B3 % 2**64
    if name.endswith("positional_encoding_gaussian_matrix"):
        offset, scale = 0, 1
    elif name.endswith("pos_embed"):
        offset, scale = 0, 0.5
    elif "rel_pos_" in name:
        offset, scale = 0, 0.3
    elif any(t in name for t in ("point_embeddings.", "not_a_point_embed", "no_mask_embed", "mask_tokens", "iou_token")):
        offset, scale = 0, 1
    elif name.endswith(".bias"):
        offset, scale = 0, 0.2
    elif len(shape) == 1:
        offset, scale = 1, 0.2
    else:
        transposed = "deconv" in name or name.endswith("single_up.3.weight")
        offset, scale = 0, math.sqrt(3 / (shape[0] if transposed else math.prod(shape[1:])))
    with np.errstate(over="ignore"):
        i = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
        z = np.uint64(h) + i * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    v = 2 * ((z >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)) - np.float32(1)
    return torch.from_numpy((np.float32(offset) + np.float32(scale) * v).reshape(shape))


class Prism:
    """Functional network over a dictionary of tensors."""

    def __init__(self, weights, size, dtype=torch.float32, device="cpu", config=BASE):
        self.w = {k: v.to(device=device, dtype=dtype) for k, v in weights.items()}
        self.c = config
        self.size, self.dtype, self.device = size, dtype, device
        grid = size // 16
        axis = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
        i, j, k = torch.meshgrid(axis, axis, axis, indexing="ij")
        self.code = self._fourier(torch.stack([j, i, k], -1)).reshape(grid**3, -1)

    def _fourier(self, c):
        g = self.w["prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"].double()
        a = 2 * math.pi * ((2 * c.to(g.device) - 1) @ g)
        return torch.cat([a.sin(), a.cos(), a.sin()], -1).to(self.dtype)

    def _linear(self, x, at):
        return F.linear(x, self.w[at + ".weight"], self.w[at + ".bias"])

    def _conv(self, x, at, **kw):
        return F.conv3d(x, self.w[at + ".weight"], self.w.get(at + ".bias"), **kw)

    def _ln(self, x, at, eps):
        return F.layer_norm(x, x.shape[-1:], self.w[at + ".weight"], self.w[at + ".bias"], eps)

    def _ln_channels(self, x, at, eps=1e-6):
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        shape = (-1, 1, 1, 1)
        return (x - mean) / torch.sqrt(var + eps) * self.w[at + ".weight"].view(shape) + self.w[at + ".bias"].view(shape)

    def _pair(self, x, at):
        for n in (0, 1):
            x = self._conv(x, f"{at}.conv_{n}.conv", padding=1)
            norm = f"{at}.conv_{n}.adn.N"
            x = F.leaky_relu(F.instance_norm(x, weight=self.w[norm + ".weight"], bias=self.w[norm + ".bias"], eps=1e-5), 0.1)
        return x

    def _vit_attention(self, x, at):
        b, s, _, _, dim = x.shape
        heads = self.c["heads"]
        hd = dim // heads
        qkv = self._linear(x, at + ".qkv").reshape(b, s**3, 3, heads, hd).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.reshape(3, b * heads, s**3, hd)
        scores = (q * hd**-0.5) @ k.transpose(-2, -1)
        index = torch.arange(s, device=x.device)[:, None] - torch.arange(s, device=x.device)[None] + s - 1
        rd, rh, rw = (self.w[f"{at}.rel_pos_{a}"][index] for a in "dhw")
        rq = q.reshape(b * heads, s, s, s, hd)
        # d: by the query's own place; h and w: read the queries at (d, h, key d) and (d, h, key h);
        # tables by the key's last index.
        a = torch.einsum("bdhwc,dkc->bdhwk", rq, rd)
        bb = torch.einsum("bdhpc,hkc->bdhpk", rq, rh)
        cc = torch.einsum("bdhpc,pkc->bdhpk", rq, rw)
        scores = scores.view(b * heads, s, s, s, s, s, s)
        scores = scores + a[:, :, :, :, None, None, :] + bb[:, :, :, None, :, None, :] + cc[:, :, :, None, None, :, :]
        out = scores.view(b * heads, s**3, s**3).softmax(-1) @ v
        out = out.view(b, heads, s, s, s, hd).permute(0, 2, 3, 4, 1, 5).reshape(b, s, s, s, dim)
        return self._linear(out, at + ".proj")

    def in_windows(self, y, edge, at):
        """Attention within windows of `edge`, the grid padded with zeros at its end."""
        s = y.shape[1]
        pad = -s % edge
        y, n = F.pad(y, (0, 0, 0, pad, 0, pad, 0, pad)), (s + pad) // edge
        y = y.view(-1, n, edge, n, edge, n, edge, y.shape[-1]).permute(0, 1, 3, 5, 2, 4, 6, 7)
        y = self._vit_attention(y.reshape(-1, edge, edge, edge, y.shape[-1]), at)
        y = y.view(-1, n, n, n, edge, edge, edge, y.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6, 7)
        return y.reshape(-1, s + pad, s + pad, s + pad, y.shape[-1])[:, :s, :s, :s]

    def _block(self, x, index):
        at = f"image_encoder.blocks.{index}"
        y = self._ln(x, at + ".norm1", 1e-6)
        if index in self.c["global"]:
            y = self._vit_attention(y, at + ".attn")
        else:
            y = self.in_windows(y, self.c["window"], at + ".attn")
        x = x + y
        y = F.gelu(self._linear(self._ln(x, at + ".norm2", 1e-6), at + ".mlp.lin1"))
        return x + self._linear(y, at + ".mlp.lin2")

    def _up(self, x, at):
        x = F.gelu(self._ln_channels(self._conv(x, at + ".0", padding=1), at + ".1"))
        x = F.conv_transpose3d(x, self.w[at + ".3.weight"], self.w[at + ".3.bias"], stride=2)
        return F.gelu(self._ln_channels(x, at + ".4"))

    def encode(self, image):
        """`image` [1, 1, s, s, s] to the image embedding and the four skip features."""
        e = "image_encoder"
        x = [self._pair(image, f"{e}.cnn_encoder.conv_0")]
        for level in range(1, 5):
            x.append(self._pair(F.max_pool3d(x[-1], 2), f"{e}.cnn_encoder.down_{level}.convs"))
        t = self._conv(image, f"{e}.patch_embed.proj", stride=16).permute(0, 2, 3, 4, 1) + self.w[f"{e}.pos_embed"]
        for b in range(self.c["depth"]):
            t = self._block(t, b)
            if b + 1 in self.c["taps"]:
                n = self.c["taps"].index(b + 1)
                y = t.permute(0, 4, 1, 2, 3)
                for m in range(3 - n):
                    y = self._up(y, f"{e}.neck_list.{n}.up.{m}.single_up")
                x[n + 1] = x[n + 1] + y
        y = F.gelu(self._ln_channels(self._conv(t.permute(0, 4, 1, 2, 3), f"{e}.neck.0"), f"{e}.neck.1"))
        y = F.gelu(self._ln_channels(self._conv(y, f"{e}.neck.3", padding=1), f"{e}.neck.4"))
        return y + x[4], x[:4]

    def _attention(self, q, k, v, at):
        def heads(x, name):
            x = self._linear(x, f"{at}.{name}_proj")
            return x.view(1, x.shape[1], 8, -1).transpose(1, 2)

        out = F.scaled_dot_product_attention(heads(q, "q"), heads(k, "k"), heads(v, "v"))
        return self._linear(out.transpose(1, 2).flatten(2), at + ".out_proj")

    def _prompts(self, embedding, points, labels, box, dense):
        p = "prompt_encoder"
        point = lambda n: self.w[f"{p}.point_embeddings.{n}.weight"]
        place = lambda c: self._fourier((c.double() + 0.5) / self.size)
        tokens = [self.w[f"{p}.iou_token.weight"], self.w[f"{p}.mask_tokens.weight"]]
        if points is not None:
            tokens.append(place(points) + torch.where(labels[:, None].to(self.device) == 1, point(1), point(0)))
            if box is None:
                tokens.append(self.w[f"{p}.not_a_point_embed.weight"])
        if box is not None:
            tokens.append(place(box.view(2, 3)) + torch.cat([point(2), point(3)]))
        first = torch.cat(tokens)[None]
        d = F.interpolate(dense, scale_factor=0.25, mode="nearest")
        for i in (0, 3):
            d = self._conv(d, f"{p}.mask_downscaling.{i}", stride=2)
            d = F.gelu(self._ln_channels(d, f"{p}.mask_downscaling.{i + 1}"))
        d = self._conv(d, f"{p}.mask_downscaling.6")
        keys = (embedding + d).flatten(2).transpose(1, 2)
        queries, code, t = first, self.code, f"{p}.transformer"
        for layer in range(2):
            at = f"{t}.layers.{layer}"
            if layer == 0:
                queries = self._attention(queries, queries, queries, f"{at}.self_attn")
            else:
                q = queries + first
                queries = queries + self._attention(q, q, queries, f"{at}.self_attn")
            queries = self._ln(queries, f"{at}.norm1", 1e-5)
            at_image = f"{at}.cross_attn_token_to_image"
            queries = queries + self._attention(queries + first, keys + code, keys, at_image)
            queries = self._ln(queries, f"{at}.norm2", 1e-5)
            queries = queries + self._linear(F.relu(self._linear(queries, f"{at}.mlp.lin1")), f"{at}.mlp.lin2")
            queries = self._ln(queries, f"{at}.norm3", 1e-5)
            at_tokens = f"{at}.cross_attn_image_to_token"
            keys = keys + self._attention(keys + code, queries + first, queries, at_tokens)
            keys = self._ln(keys, f"{at}.norm4", 1e-5)
        queries = queries + self._attention(queries + first, keys + code, keys, f"{t}.final_attn_token_to_image")
        return self._ln(queries, f"{t}.norm_final_attn", 1e-5), keys.transpose(1, 2).reshape(embedding.shape)

    def _mlp(self, x, at):
        for i in range(3):
            x = self._linear(x, f"{at}.layers.{i}")
            x = F.relu(x) if i < 2 else x
        return x

    def interact(self, image, features, points, labels, box, dense, history):
        """Points [n, 3], labels [n], box [6], dense prompt [1, 1, s, s, s], prompt maps [1, 2, s,
        s, s]; returns candidates, scores, answer."""
        embedding, skips = features
        tokens, x = self._prompts(embedding, points, labels, box, dense)
        for level in range(4, 0, -1):
            at = f"mask_decoder.decoder.upcat_{level}"
            deconv = at + ".upsample.deconv"
            up = F.conv_transpose3d(x, self.w[deconv + ".weight"], self.w[deconv + ".bias"], stride=2)
            x = self._pair(torch.cat([skips[level - 1], up], 1), at + ".convs")
        hyper = torch.stack([self._mlp(tokens[:, 1 + j], f"mask_decoder.output_hypernetworks_mlps.{j}") for j in range(1, 4)], 1)
        masks = (hyper @ x.flatten(2)).view(1, 3, *x.shape[2:])
        scores = torch.sigmoid(self._mlp(tokens[:, 0], "mask_decoder.iou_prediction_head"))[:, 1:]
        # The mask reaches the refiner without its gradient.
        m = masks[:, scores[0].argmax()][:, None].detach()
        r = "mask_decoder.refine"
        half = lambda t: F.interpolate(t, scale_factor=0.5, mode="trilinear")
        y = torch.cat([half(image), half((torch.sigmoid(m) > 0.5).to(m.dtype)), half(history)], 1)
        y = self._conv(y, r + ".first_conv")
        y = y + self._pair(y, r + ".conv1")
        y = y + self._pair(y, r + ".conv2")
        y = self._conv(y, r + ".conv_error_map") * self._conv(y, r + ".conv_correction") + half(m)
        return masks, scores, F.interpolate(y, scale_factor=2, mode="trilinear")


    def losses(self, answer, label, boundary=10.0, batch=1):
        """The training loss of one iteration: an item's share of a batch's, over which the errors
        of scores are summed and all else averaged."""
        masks, scores, refined = answer

        def edges(m):
            return (m - F.avg_pool3d(m, (5, 5, 1), 1, (2, 2, 0))).abs()

        def mask_loss(m):
            p = m.sigmoid()
            dice = 1 - (2 * (p * label).sum() + 1e-5) / (p.square().sum() + label.square().sum() + 1e-5)
            return (dice + F.binary_cross_entropy_with_logits(m, label) + boundary * F.mse_loss(edges(p), edges(label))) / batch

        total = mask_loss(refined)
        for j in range(masks.shape[1]):
            m = masks[:, j : j + 1]
            p = m.detach().sigmoid()
            dice = (2 * (p * label).sum() + 1e-5) / (p.sum() + label.sum() + 1e-5)
            total = total + mask_loss(m) + (scores[0, j] - dice).square()
        return total


def load(salt, size, dtype=torch.float32, device="cpu", config=BASE):
    """The network with hashed weights."""
    return Prism({n: hashed(salt, n, s) for n, s in shapes(size, config).items()}, size, dtype, device, config)
