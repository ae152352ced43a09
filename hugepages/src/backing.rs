//! Which pages an arena can stand on.

use serde::Serialize;

use crate::{PageSize, Survey, Transparent};

/// The kind of pages behind a mapping, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Backing {
    /// Pages of this size from the kernel's pool: never swapped, never moved.
    Huge(PageSize),
    /// Ordinary pages that the kernel may join into huge ones.
    Transparent,
    /// Ordinary pages.
    Ordinary,
}

/// A [`Backing`] and why each better one was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Choice {
    /// What to use.
    pub backing: Backing,
    /// One line for each better backing that could not be had, each ending
    /// in what to type to have it.
    pub reasons: Vec<String>,
}

impl Survey {
    /// The best backing for `len_bytes`: the pool of the preferred `size`,
    /// else transparent huge pages, else ordinary ones. It looks and
    /// promises nothing: the pages may be gone by the time they are mapped.
    pub fn choose(&self, size: PageSize, len_bytes: u64) -> Choice {
        let mut reasons = Vec::new();
        let backing = match self.refusal(size, len_bytes) {
            None => Backing::Huge(size),
            Some(reason) => {
                reasons.push(reason);
                match self.transparent {
                    Transparent::Always | Transparent::Madvise => Backing::Transparent,
                    Transparent::Never => {
                        reasons.push(
                            "transparent huge pages are off; as root: \
                             echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
                                .to_owned(),
                        );
                        Backing::Ordinary
                    }
                    Transparent::Absent => {
                        reasons.push("this kernel has no transparent huge pages".to_owned());
                        Backing::Ordinary
                    }
                }
            }
        };
        Choice { backing, reasons }
    }

    fn refusal(&self, size: PageSize, len_bytes: u64) -> Option<String> {
        let Some(pool) = self.pool(size) else {
            return Some(format!("this kernel has no pages of {size}"));
        };
        let wanted = size.pages_for(len_bytes);
        // Surplus pages already made count against the overcommit limit.
        let usable = pool.usable() + pool.overcommit.saturating_sub(pool.surplus);
        if wanted > usable {
            return Some(format!(
                "{wanted} pages of {size} are needed and {usable} are free; \
                 as root: echo {} > {}/{}/nr_hugepages",
                pool.total - pool.surplus.min(pool.total) + (wanted - usable),
                crate::survey::POOLS,
                size.directory(),
            ));
        }
        let tight = self
            .cgroups
            .iter()
            .find(|limit| limit.size == size && limit.left_bytes() / size.bytes() < wanted)?;
        Some(format!(
            "the control group allows {} more pages of {size} of the {wanted} needed; \
             as root: echo {} > {}",
            tight.left_bytes() / size.bytes(),
            tight.used_bytes + wanted * size.bytes(),
            tight.file.display(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use crate::survey;

    fn survey_with(pages: u64, transparent: &str) -> Survey {
        let fake = Fake::new();
        fake.pool(PageSize::MB_2, &[(0, pages)]);
        fake.write("/sys/kernel/mm/transparent_hugepage/enabled", transparent);
        survey(&fake.root()).expect("the tree is whole")
    }

    #[test]
    fn takes_huge_pages_while_there_are_enough() {
        let choice = survey_with(4, "[always]").choose(PageSize::MB_2, 8 << 20);
        assert_eq!(choice.backing, Backing::Huge(PageSize::MB_2));
        assert_eq!(choice.reasons, [] as [String; 0]);
    }

    #[test]
    fn falls_back_with_the_reason_and_the_remedy() {
        let choice = survey_with(4, "always [madvise] never").choose(PageSize::MB_2, 10 << 20);
        assert_eq!(choice.backing, Backing::Transparent);
        assert_eq!(choice.reasons.len(), 1);
        assert!(
            choice.reasons[0]
                .ends_with("echo 5 > /sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"),
            "{:?}",
            choice.reasons
        );

        let choice = survey_with(0, "always madvise [never]").choose(PageSize::GB_1, 1);
        assert_eq!(choice.backing, Backing::Ordinary);
        assert_eq!(choice.reasons.len(), 2);
    }

    #[test]
    fn a_control_group_bounds_the_choice() {
        let mut survey = survey_with(100, "[never]");
        survey.cgroups.push(crate::CgroupLimit {
            size: PageSize::MB_2,
            max_bytes: 8 << 20,
            used_bytes: 4 << 20,
            file: "/cg/hugetlb.2MB.max".into(),
        });
        let at_limit = survey.choose(PageSize::MB_2, 4 << 20);
        assert_eq!(at_limit.backing, Backing::Huge(PageSize::MB_2));
        let beyond = survey.choose(PageSize::MB_2, 6 << 20);
        assert_eq!(beyond.backing, Backing::Ordinary);
        assert!(
            beyond.reasons[0].ends_with("echo 10485760 > /cg/hugetlb.2MB.max"),
            "{:?}",
            beyond.reasons
        );
    }
}
