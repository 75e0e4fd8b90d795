"""Clipping in pytorch-forecasting, whose models train by a Trainer of Lightning.

python examples/forecasting_tft.py
"""

import numpy as np
import pandas as pd
from lightning.pytorch import Trainer
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

from lightning_gradclip import GradientClipping, NormClip

steps = np.arange(120)
table = pd.DataFrame({"step": steps, "series": "a", "value": np.sin(steps / 5).astype("float32")})
data = TimeSeriesDataSet(
    table,
    time_idx="step",
    target="value",
    group_ids=["series"],
    time_varying_unknown_reals=["value"],
    max_encoder_length=12,
    max_prediction_length=4,
)
model = TemporalFusionTransformer.from_dataset(data, hidden_size=8, attention_head_size=1, learning_rate=0.01)
# In place of the gradient_clip_val=0.1 of its tutorials.
clipping = GradientClipping(NormClip(max_norm=0.1))
trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=[clipping], logger=False, enable_checkpointing=False)
trainer.fit(model, data.to_dataloader(train=True, batch_size=16, num_workers=0))
print("gradclip/norm", float(trainer.callback_metrics["gradclip/norm"]))
