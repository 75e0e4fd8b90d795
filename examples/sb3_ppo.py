"""Clipping in Stable-Baselines3, whose loop cannot be edited: PPO on CartPole.

python examples/sb3_ppo.py
"""

import argparse
import math

from stable_baselines3 import PPO

from lightning_gradclip import QuantileClip, attach

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=4096)
args = parser.parse_args()

# Its own clipping, at 0.5 by default, comes first: infinity lets everything through.
model = PPO("MlpPolicy", "CartPole-v1", n_steps=256, max_grad_norm=math.inf, seed=1, device="cpu")
clipper = attach(model.policy.optimizer, model.policy, QuantileClip(q=0.9), history="outputs/sb3_ppo/gradclip")
model.learn(args.steps)
clipper.close()
print(clipper.steps, "steps:", {name: round(float(value), 3) for name, value in clipper.metrics().items()})
