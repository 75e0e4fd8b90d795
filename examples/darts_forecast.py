"""Clipping in darts, whose models train by a Trainer of Lightning.

python examples/darts_forecast.py
"""

from pathlib import Path

import numpy as np
from darts import TimeSeries
from darts.models import RNNModel

from lightning_gradclip import GradientClipping, NormClip

series = TimeSeries.from_values(np.sin(np.arange(200) / 5).astype(np.float32))
clipping = GradientClipping(NormClip(max_norm=0.1))
options = {"accelerator": "cpu", "callbacks": [clipping], "enable_progress_bar": False, "enable_model_summary": False}
model = RNNModel(12, model="LSTM", training_length=24, n_epochs=5, random_state=1, pl_trainer_kwargs=options)
model.fit(series)
print("gradclip/norm", float(model.trainer.callback_metrics["gradclip/norm"]))

# A saved model has its callbacks in it, which darts reads only where it is told to.
Path("outputs").mkdir(exist_ok=True)
model.save("outputs/darts_model.pt")
again = RNNModel.load("outputs/darts_model.pt", trusted=True)
print(again.predict(3).values().ravel())
