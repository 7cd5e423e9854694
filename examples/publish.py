"""Look at what a push of a conversion would upload, its card among the files, and push it with --push.

    pip install hf_attnswap
    python publish.py --model_name_or_path finetuned --repo_id me/SmolLM2-135M-relu_norm \\
        --base_model HuggingFaceTB/SmolLM2-135M --licence apache-2.0
"""

import argparse

from hf_attnswap.publish.push import prepare, push


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="the folder of a conversion")
    parser.add_argument("--repo_id", required=True, help="where it goes on the Hub, USER/NAME")
    parser.add_argument(
        "--base_model", help="Hub id of the model that was converted, where config.json does not say it"
    )
    parser.add_argument("--licence", help="where the card of the base model on the Hub does not say it")
    parser.add_argument("--push", action="store_true", help="push; without it nothing leaves this machine")
    args = parser.parse_args(argv)

    operations = prepare(args.model_name_or_path, args.repo_id, base_model=args.base_model, licence=args.licence)
    for operation in operations:
        print(f"{operation.path_in_repo}: {operation.upload_info.size:,} bytes")
    if args.push:
        print(push(operations, args.repo_id))
    else:
        print(f"dry run: nothing was pushed to {args.repo_id}")


if __name__ == "__main__":
    main()
