"""Predict labels for the rows of a file with a fine-tuned model.

    ordnung predict --model_name_or_path out/tickets --file new.csv --output predictions.csv

Takes what finetune.py wrote (its output folder means the best of its runs), merged, stand-alone and adapter folders,
and models of transformers' own, also from the Hub. The output has the columns of the input and, beside them, what is
predicted: `predicted_label` and `predicted_probability` of classes, `predicted_labels` above the threshold of a
multi-label model, `predicted_value` of a regression, `predicted_tags` of words, `predicted_answer` of a question.
Files larger than memory are read piece by piece; the same command goes on where it was stopped.
"""

from ordnung.scripts.common.errors import run_script
from ordnung.scripts.common.options import program
from ordnung.scripts.finetuning.options import PredictOptions

main = program(PredictOptions, "finetuning.predicting", __doc__)

if __name__ == "__main__":
    run_script(main)
