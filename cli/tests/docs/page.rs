//! A page: its commands, and what comments say about them.
//!
//! | comment | meaning |
//! |---|---|
//! | `<!-- lab: FOLDER -->` | raise the clusters of this scenario first; its contexts are in `KUBECONFIG` |
//! | `<!-- lab: none -->` | remove the lab that an earlier comment raised |
//! | `<!-- exits: 1 -->` | the next block's exit status; 0 when nothing is said |
//! | `<!-- shows: TEXT -->` | what the next block's output contains; may be given several times |
//! | `<!-- again: 60s -->` | the next block is tried anew until it does as said, for so long at most |

use std::path::Path;
use std::time::Duration;

/// A page's commands, in order.
pub(crate) struct Page {
    pub(crate) blocks: Vec<Block>,
}

/// A fence of commands.
#[derive(Default)]
pub(crate) struct Block {
    /// In the page, from 1.
    pub(crate) line: usize,
    pub(crate) lab: Option<Lab>,
    pub(crate) exits: i32,
    pub(crate) shows: Vec<String>,
    pub(crate) again: Option<Duration>,
    pub(crate) commands: String,
}

/// What a block wants of the machine before it is run.
pub(crate) enum Lab {
    None,
    Scenario(String),
}

impl Page {
    pub(crate) fn read(path: &Path) -> Result<Self, String> {
        Self::parse(&std::fs::read_to_string(path).map_err(|error| error.to_string())?)
    }

    fn parse(text: &str) -> Result<Self, String> {
        let mut blocks = Vec::new();
        let mut next = Block::default();
        let mut lines = text.lines().zip(1..);
        while let Some((line, number)) = lines.next() {
            if let Some(comment) =
                line.trim().strip_prefix("<!-- ").and_then(|line| line.strip_suffix(" -->"))
            {
                next.comment(comment).map_err(|error| format!("line {number}: {error}"))?;
                continue;
            }
            let Some(language) = line.trim_start().strip_prefix("```") else { continue };
            let indent = line.len() - line.trim_start().len();
            let body: Vec<&str> = lines
                .by_ref()
                .map(|(line, _)| line)
                .take_while(|line| !line.trim_start().starts_with("```"))
                .map(|line| line.get(indent..).unwrap_or_default())
                .collect();
            match language {
                "sh" => {
                    let block = std::mem::take(&mut next);
                    blocks.push(Block { line: number, commands: body.join("\n"), ..block });
                }
                "text" | "yaml" | "json" => {}
                other => {
                    return Err(format!(
                        "line {number}: a fence of {other:?}; commands are `sh` and are run, the rest is `text`, `yaml` or `json`"
                    ));
                }
            }
        }
        Ok(Self { blocks })
    }
}

impl Block {
    fn comment(&mut self, comment: &str) -> Result<(), String> {
        let (name, value) = comment.split_once(": ").ok_or_else(|| format!("unknown comment {comment:?}"))?;
        match name {
            "lab" if value == "none" => self.lab = Some(Lab::None),
            "lab" => self.lab = Some(Lab::Scenario(value.to_owned())),
            "exits" => self.exits = value.parse().map_err(|error| format!("{value}: {error}"))?,
            "shows" => self.shows.push(value.to_owned()),
            "again" => {
                let seconds = value.strip_suffix('s').and_then(|seconds| seconds.parse().ok());
                self.again = Some(Duration::from_secs(seconds.ok_or_else(|| format!("{value}: write 60s"))?));
            }
            _ => return Err(format!("unknown comment {comment:?}")),
        }
        Ok(())
    }
}

/// The targets of relative links.
pub(crate) fn links(text: &str) -> impl Iterator<Item = &str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets.filter(|target| {
        !target.contains("://") && !target.starts_with('#') && !target.contains(char::is_whitespace)
    })
}

#[test]
fn a_page_is_understood() {
    let page = Page::parse(
        "<!-- lab: docs/labs/two -->\n```sh\ntrue\n```\n<!-- exits: 1 -->\n<!-- shows: no -->\n  ```sh\n  false\n  ```\n```yaml\na: 1\n```\n",
    )
    .unwrap();
    let [first, second] = page.blocks.as_slice() else { panic!("two blocks") };
    assert!(matches!(&first.lab, Some(Lab::Scenario(folder)) if folder == "docs/labs/two"));
    assert_eq!((first.line, first.commands.as_str(), first.exits), (2, "true", 0));
    assert_eq!(
        (second.commands.as_str(), second.exits, second.shows.as_slice()),
        ("false", 1, &["no".to_owned()][..])
    );
    assert!(Page::parse("```bash\ntrue\n```\n").is_err(), "a command that nobody would run");
    assert!(Page::parse("<!-- exit: 1 -->\n").is_err(), "a slip in a comment");
}

#[test]
fn links_are_found() {
    let text = "[a](b.md), [c](d/e.md#f), [g](#h), [i](https://example.com/j)";
    assert_eq!(links(text).collect::<Vec<_>>(), ["b.md", "d/e.md#f"]);
}
