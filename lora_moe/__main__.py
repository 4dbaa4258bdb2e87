from lora_moe.cli import main

raise SystemExit(main())
