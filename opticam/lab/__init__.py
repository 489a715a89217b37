"""The laboratory: photos and data sets, evaluation, tables of results, summaries, pictures and the explorer.

It builds on the core, which knows nothing of it, and needs the extra `lab`. Its public names are found here, loaded
when they are asked for: `from opticam import lab`, then `lab.demo()`.
"""

from importlib import import_module
from typing import Any

_NAMES = {
    "datasets": "DATASETS Photos Sample demo imagefolder imagenet imagenette load_dataset maps_to_input read_image"
    " stack to_input",
    "evaluation": "evaluate floors saliency_maps score score_maps stored_saliency stream",
    "explorer": "Explorer describe",
    "files": "REPOSITORY",
    "findings": "compare finding report",
    "known_evidence": "Mosaics OneCell Pastes best_map cell_boxes cell_drops cell_means centred choose_mosaics"
    " class_contrast evidence_rows evidence_scores find_mosaics find_pastes maps_of_other_cells"
    " maps_of_other_mosaics paste_object phase_scrambled pixel_auroc see_one_cell to_cells to_mosaics"
    " uniform",
    "metric_audit": "Audited CHANGES CONTROLS Evidence GROUPS agreement audit audit_rows audited_maps audited_metrics"
    " blurrier brighter collect_evidence judge lifted sharper truth_of",
    "plotting": "condition_panels difference_dots explanation_figure gallery image_grid interval_table latex_table"
    " metric_bars metric_scatter metric_values objective_curve overlay overview probability_bars save_figure show_boxes"
    " show_table similarity_curves to_picture use_style",
    "results": "read_arrays read_evidence read_rows read_shards write_arrays write_rows",
    "summary": "Estimate box_accuracies clear_after_holm difference difference_over_groups estimate"
    " estimate_and_p estimate_of holm interval paired paper_tables print_differences"
    " proportion_interval ratio_of_means spearman summarize summarize_differences summarize_groups",
    "synthetic": "PATTERNS draw_scenes",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """A public name of the laboratory."""
    if name not in _HOMES:
        raise AttributeError(f"module 'opticam.lab' has no attribute {name!r}")
    module = import_module(f"opticam.lab.{_HOMES[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
