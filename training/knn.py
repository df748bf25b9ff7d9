"""Judge frozen features by nearest neighbours: `python -m training.knn --model runs/NAME/model --dataset photos`."""

import sys
from dataclasses import dataclass
from typing import Any

from training.config import setting
from training.evaluation import FrozenSettings, FrozenSplits, frozen_splits, start_evaluation
from training.judge import knn_accuracy
from training.parser import parse_settings
from training.results import add_results, table


@dataclass
class KnnConfig(FrozenSettings):
    """The protocol of DINO (arXiv 2104.14294), and the plain majority of the same neighbours."""

    k: int = setting(20, "nearest neighbours that vote")
    temperature: float = setting(0.07, "a neighbour's vote weighs exp(cosine / temperature), > 0")

    def validate(self) -> None:
        """Raise a ValueError that names the first impossible setting, its value and the remedy."""
        super().validate()
        self._validate_at_least(1, "k")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}.")


def judge(splits: FrozenSplits, config: KnnConfig) -> list[dict[str, Any]]:
    """Entries of eval.json: both ways of voting, by all labelled images and by the few of each few-shot share."""
    queries, answers = splits.test.features["features"], splits.test.labels
    results = []
    for share, votes, labels in splits.selections(config):
        for temperature in (config.temperature, None):
            how = f"weighted by exp(cosine / {temperature})" if temperature else "of equal weight"
            protocol = f"kNN, k={config.k}, cosine, votes {how}, whole central crop"
            value = knn_accuracy(votes, labels, queries, answers, config.k, temperature)
            results.append(splits.result("training.knn", config, share, len(votes), protocol=protocol, value=value))
    return results


def main(config: KnnConfig) -> None:
    """Extract, judge, write and print."""
    accelerator = start_evaluation(config)
    results = judge(frozen_splits(accelerator, config), config)
    if accelerator.is_main_process:
        add_results(config.results_folder(), results)
    rows = {
        f"{100 * entry['label_share']:g} % of the labels, {entry['protocol'].split(', ')[3]}": f"{entry['value']:6.1%}"
        for entry in results
    }
    accelerator.print(table(f"kNN accuracy of {config.whose()} on {results[0]['num_test_images']} images", rows))
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main(parse_settings(KnnConfig, "training.knn"))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"training.knn: {error}")
